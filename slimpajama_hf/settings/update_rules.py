"""How hidden matrices and embeddings learn, as flags ask for it; `model/optimization.py` does it."""

from __future__ import annotations

from dataclasses import dataclass

from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings.arguments import HIDDEN_RATES

#: Values of `--optim` beside which hidden matrices and embeddings can learn in ways of their own.
ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass(frozen=True)
class UpdateRules:
    """How hidden matrices and embeddings of tokens learn."""

    hidden_optim: str = "muon"
    """`muon`, `adamw`, or another `--optim` if it is not AdamW."""
    hidden_rate: float = HIDDEN_RATES["muon"]
    """The rate of hidden matrices as a share of the learning rate."""
    embedding_moment: str = "row"
    """`row`: one second moment for each token; `element`: for each element."""

    @classmethod
    def of(cls, optim: str, hidden_optim: str, rate: float | None, embedding_moment: str) -> UpdateRules:
        """The rules that `--optim`, `--hidden_optim`, `--hidden_rate` (None: its default, 1 for optimizers that are not
        AdamW) and `--embedding_moment` ask for. Raises UsageError for rows that nothing would have."""
        is_adamw = optim in ADAMW
        by_muon = is_adamw and hidden_optim == "muon"
        if embedding_moment == "row" and not by_muon:
            other = f"--hidden_optim {hidden_optim}" if is_adamw else f"--optim {optim}"
            raise UsageError(f"--embedding_moment row: it needs --hidden_optim muon, found {other}; leave one out")
        if not is_adamw:
            return cls(optim, 1.0 if rate is None else rate, "element")
        moment = ("row" if by_muon else "element") if embedding_moment == "auto" else embedding_moment
        return cls(hidden_optim, HIDDEN_RATES[hidden_optim] if rate is None else rate, moment)

    @property
    def by_muon(self) -> bool:
        """Whether hidden matrices learn by Muon."""
        return self.hidden_optim == "muon"

    @property
    def by_row(self) -> bool:
        """Whether embeddings of tokens have one second moment a row."""
        return self.embedding_moment == "row"
