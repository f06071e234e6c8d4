"""Pre-train a GPT-2-style model on SlimPajama, one document per step, everything visible."""

from pathlib import Path

__version__ = "0.1.0"

#: Where the training script lies beside the package: the checkout, or site-packages.
ROOT = Path(__file__).resolve().parent.parent

#: The shipped configurations: beside the package in the checkout, inside of it where it was installed.
CONFIGS = next(path for path in (Path(__file__).parent / "configs", ROOT / "configs") if path.is_dir())

#: What `accelerate launch` is given to train with.
TRAINING_PROGRAM = "run_clm_slimpajama.py" if CONFIGS.parent == ROOT else "-m run_clm_slimpajama"
