"""Pre-train a GPT-2-style model on SlimPajama, one document per step, everything visible.

Other scripts import from here: `from slimpajama_hf import ExactStream, RunRecord` (docs/two-lines.md). Names that are
not in `__all__` are private.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimpajama_hf.anywhere.exact_checkpoints import ExactCheckpoints as ExactCheckpoints
    from slimpajama_hf.anywhere.exact_stream import ExactStream as ExactStream
    from slimpajama_hf.anywhere.noise_scale import noise_scale as noise_scale
    from slimpajama_hf.anywhere.run_record import RunRecord as RunRecord
    from slimpajama_hf.anywhere.step_charts import StepCharts as StepCharts
    from slimpajama_hf.anywhere.turned_muon import TurnedMuon as TurnedMuon
    from slimpajama_hf.anywhere.weight_average import WeightAverage as WeightAverage

__version__ = "0.1.0"

#: The folder that holds this package and the training script: the checkout, or site-packages.
ROOT = Path(__file__).resolve().parent.parent

#: Folder of the shipped configurations: beside the package in a checkout, inside it where it was installed.
CONFIGS = next(path for path in (Path(__file__).parent / "configs", ROOT / "configs") if path.is_dir())

#: What to type after `accelerate launch` to train.
TRAINING_PROGRAM = "run_clm_slimpajama.py" if CONFIGS.parent == ROOT else "-m run_clm_slimpajama"

#: Public name -> its module in `anywhere/`, which is imported when the name is first used.
_PUBLIC = {
    "ExactCheckpoints": "exact_checkpoints",
    "ExactStream": "exact_stream",
    "RunRecord": "run_record",
    "StepCharts": "step_charts",
    "TurnedMuon": "turned_muon",
    "WeightAverage": "weight_average",
    "noise_scale": "noise_scale",
}

__all__ = [
    "ExactCheckpoints",
    "ExactStream",
    "RunRecord",
    "StepCharts",
    "TurnedMuon",
    "WeightAverage",
    "__version__",
    "noise_scale",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.anywhere.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
