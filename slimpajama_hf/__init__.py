"""Pre-train a GPT-2-style model on SlimPajama, one document per step, everything visible."""

from pathlib import Path

__version__ = "0.1.0"

#: The checkout: `configs/` and the training script lie in it.
ROOT = Path(__file__).resolve().parent.parent
