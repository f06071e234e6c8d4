"""Pre-train a GPT-2-style model on SlimPajama, one document per step, everything visible."""

__version__ = "0.1.0"
