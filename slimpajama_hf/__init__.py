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
    from slimpajama_hf.anywhere.training_run import TrainingRun as TrainingRun
    from slimpajama_hf.anywhere.turned_muon import TurnedMuon as TurnedMuon
    from slimpajama_hf.anywhere.weight_average import WeightAverage as WeightAverage
    from slimpajama_hf.program import run_program as run_program

__version__ = "0.1.0"

#: The folder that holds this package and the training script: the checkout, or site-packages.
ROOT = Path(__file__).resolve().parent.parent

#: Folder of the shipped configurations: beside the package in a checkout, inside it where it was installed.
CONFIGS = next(path for path in (Path(__file__).parent / "configs", ROOT / "configs") if path.is_dir())

#: What to type after `accelerate launch` to train.
TRAINING_PROGRAM = "run_clm_slimpajama.py" if CONFIGS.parent == ROOT else "-m run_clm_slimpajama"

#: Public name -> its module, which is imported when the name is first used.
_PUBLIC = {
    "ExactCheckpoints": "anywhere.exact_checkpoints",
    "ExactStream": "anywhere.exact_stream",
    "RunRecord": "anywhere.run_record",
    "StepCharts": "anywhere.step_charts",
    "TrainingRun": "anywhere.training_run",
    "TurnedMuon": "anywhere.turned_muon",
    "WeightAverage": "anywhere.weight_average",
    "noise_scale": "anywhere.noise_scale",
    "run_program": "program",
}

__all__ = [
    "ExactCheckpoints",
    "ExactStream",
    "RunRecord",
    "StepCharts",
    "TrainingRun",
    "TurnedMuon",
    "WeightAverage",
    "__version__",
    "noise_scale",
    "run_program",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
