"""`TurnedMuon`: the optimizer of this program for any model and loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimpajama_hf.errors import UsageError
from slimpajama_hf.model.optimization import AdamWWithMuon, hidden_matrices, set_apart, token_embeddings
from slimpajama_hf.settings.arguments import HIDDEN_RATES


class TurnedMuon(AdamWWithMuon):
    """AdamW, with Muon for the matrices in the blocks, which take turns: each moves at every 32nd document.

        trainer = Trainer(model, args, train_dataset=data, optimizers=(TurnedMuon(model, lr=1e-3), None))

    A matrix moves by the average of its gradients, made orthogonal, as far as AdamW would move it in as many steps
    (reasons in `model/optimization.py`, results in docs/recipe.md). Embeddings, head, norms and biases learn by AdamW;
    embeddings and head with one second moment a token (`embedding_moment="row"`), or as ever (`"element"`).

    `lr`: for AdamW; the matrices learn at `hidden_rate` times that. `documents`: how many a step has, to count when a
    matrix has its turn. `weight_decay` applies to parameters of two dimensions or more. `product_dtype`: in what the
    orthogonal matrix is computed; None: bfloat16 on a GPU, else float32. An optimizer of the same model can load its
    state_dict. `fused`: as for AdamW. Raises UsageError for an invalid setting, and for a model without such a
    matrix."""

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hidden_rate: float = HIDDEN_RATES["muon"],
        embedding_moment: str = "row",
        documents: int = 1,
        product_dtype: torch.dtype | None = None,
        fused: bool = False,
    ) -> None:
        if embedding_moment not in ("row", "element"):
            raise UsageError(f"TurnedMuon(embedding_moment={embedding_moment!r}): expected 'row' or 'element'")
        if documents < 1 or hidden_rate <= 0:
            raise UsageError(
                f"TurnedMuon(documents={documents}, hidden_rate={hidden_rate}): expected 1 document or more, and a "
                "rate above 0"
            )
        learned = [each for each in model.parameters() if each.requires_grad]
        matrices = [each for each in hidden_matrices(model) if each.requires_grad]
        flat = [each for each in matrices if each.ndim == 2]
        if not flat:
            raise UsageError(f"TurnedMuon: {type(model).__name__} has no matrix beside embeddings and head; use AdamW")
        if product_dtype is None:
            product_dtype = torch.bfloat16 if flat[0].device.type == "cuda" else torch.float32
        groups: list[dict[str, Any]] = [
            {"params": [each for each in learned if each.ndim >= 2], "weight_decay": weight_decay},
            {"params": [each for each in learned if each.ndim < 2], "weight_decay": 0.0},
        ]
        kept = [group for group in groups if group["params"]]
        super().__init__(kept, product_dtype, documents, lr=lr, betas=betas, eps=eps, fused=fused)
        set_apart(self, flat, hidden_rate, muon=True, steps=0)
        # Parameters that hold the matrices of several experts stay with AdamW.
        set_apart(self, [each for each in matrices if each.ndim > 2], hidden_rate)
        if embedding_moment == "row":
            set_apart(self, [each for each in token_embeddings(model) if each.requires_grad], 1.0, rows=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. Raises UsageError for the state of an optimizer with another `embedding_moment`."""
        own, other = (
            any(group.get("rows", False) for group in groups)
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        if own != other:
            raise UsageError(
                f"TurnedMuon: this state was saved with another embedding_moment (older versions had 'element' alone); "
                f"pass embedding_moment={'row' if other else 'element'!r} to go on from it"
            )
        super().load_state_dict(state_dict)
