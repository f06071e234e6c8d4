"""How hidden matrices learn: by Muon, or by AdamW with a learning rate of their own (`--hidden_optim`).

Adam moves every weight by about the learning rate, whatever its gradient is. The output of a matrix changes the more,
the more of its inputs move together. So hidden matrices need a smaller rate than embeddings, norms and biases (Yang et
al. 2022, arXiv 2203.03466, table 3: by 1/width). Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)
makes the averaged gradient of a matrix orthogonal and moves the matrix by it: by the same length in every direction,
however rarely documents point there.

Doing this at every document costs more than forward and backward. But the average hardly changes from one document to
the next: an update every 32nd document at 32 times the rate learned nearly as much. Then Muon costs about as much as
Adam's second moment, which it does not need. docs/recipe.md has the figures.

Beside Muon, the embeddings of tokens (and the output head) learn by AdamW with one second moment for each row, a token,
instead of one for each element (`--embedding_moment`). At one document a step a row has few gradients that are not
small, and the mean of its elements' squares is known better than each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from slimpajama_hf.model import shared_turns
from slimpajama_hf.settings.update_rules import UpdateRules

#: Weight of the old average when the gradient of a document is added: a half-life of 69 documents.
MOMENTUM = 0.99
#: Root mean square of the elements of an update, as a share of the rate. AdamW's updates have the same (Liu et al.
#: 2025, arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2
#: Documents from one update of a matrix to its next. If its shorter side is above 512, a sixteenth of that side: the
#: wider a matrix, the larger the share of its update in the arithmetic of a document.
DOCUMENTS_BETWEEN = 32
#: How far the second moment of a token is moved towards the mean of all tokens, as a share of the way in logarithms.
#: 0: each token by its own alone; 1: one second moment for all.
TOWARDS_ALL_TOKENS = 0.25

#: The polynomial a x + b x^3 + c x^5 that brings singular values towards 1, and how often it is applied (5 times by
#: Jordan et al.). Singular values above 0.004 of the largest end between 0.5 and 1.2, which does as well as 1.
_POLYNOMIAL, _ITERATIONS = (3.4445, -4.7750, 2.0315), 4


#: Devices whose fused kernels use `grad_scale` and `found_inf`. The kernel of MPS takes both and ignores them
#: (aten/src/ATen/native/mps/operations/FusedAdamWKernelImpl.mm).
SCALE_IN_KERNEL = ("cpu", "cuda", "xpu")


def scales_in_kernel(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether a step divides gradients by `grad_scale` and does nothing if `found_inf` is 1, all on the device."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and device.type in SCALE_IN_KERNEL


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of two dimensions or more that are neither an embedding nor the output head."""
    outside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside |= {id(parameter) for parameter in head.parameters()}
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2 and id(parameter) not in outside]


def token_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The embedding of the tokens and the output head, each (V, D); one parameter if they are tied."""
    modules = (getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    weights = (getattr(module, "weight", None) for module in modules)
    found = {id(weight): weight for weight in weights if isinstance(weight, nn.Parameter) and weight.ndim == 2}
    return list(found.values())


def elements_by_muon(model: nn.Module, rules: UpdateRules) -> int:
    """How many parameters (elements) learn by Muon."""
    return sum(each.numel() for each in hidden_matrices(model) if each.ndim == 2) if rules.by_muon else 0


def moments_bytes(model: Any, rules: UpdateRules) -> int:
    """Bytes of the optimizer's state: two moments for AdamW, one for matrices that learn by Muon; of embeddings with a
    second moment a row one and a number for each row."""
    by_row = token_embeddings(model) if rules.by_row else []
    saved = elements_by_muon(model, rules) + sum(each.numel() - each.shape[0] for each in by_row)
    return int(8 * model.num_parameters() - 4 * saved)


def set_apart(optimizer: torch.optim.Optimizer, which: list[nn.Parameter], rate: float, **options: Any) -> None:
    """Move these parameters into new groups, after the others, with `rate` times the learning rate of their old one."""
    chosen = {id(parameter) for parameter in which}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            same: dict[str, Any] = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group(same | options | {"params": moved, "lr": group["lr"] * rate})


def with_rules(
    optimizer: Any, model: nn.Module, rules: UpdateRules, product_dtype: torch.dtype, documents: int, processes: int
) -> Any:
    """The optimizer of a run: `optimizer`, changed so that hidden matrices and embeddings learn by `rules`. It must not
    have made a step. The other parameters: see `AdamWWithMuon`."""
    if rules.by_muon:
        assert isinstance(optimizer, torch.optim.AdamW)
        return AdamWWithMuon.of(optimizer, model, rules.hidden_rate, product_dtype, documents, processes, rules.by_row)
    if rules.hidden_rate != 1.0:
        set_apart(optimizer, hidden_matrices(model), rules.hidden_rate)
    return optimizer


class AdamWWithMuon(torch.optim.AdamW):
    """AdamW, with Muon for the groups that say `muon`, and one second moment a row for those that say `rows`; all
    parameters of both are matrices.

    Each matrix of Muon has an exponential average of its gradients (4 bytes per parameter; AdamW has 8). Every
    `steps_between` steps the matrix moves by that average, made orthogonal. The length comes to `UPDATE_RMS` of the
    group's rate per step. Matrices take turns. `product_dtype`: in what the orthogonal matrix is computed. `documents`:
    how many a step has. `processes`: how many share the work (`shared_turns.py`), with equal gradients or with shards
    of them. With `fused`, `grad_scale` and `found_inf` work as in AdamW, without waiting for the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        product_dtype: torch.dtype = torch.bfloat16,
        documents: int = 1,
        processes: int = 1,
        **adamw: Any,
    ) -> None:
        super().__init__(groups, **adamw)
        self._product_dtype = product_dtype
        self._documents, self._processes = documents, processes

    @classmethod
    def of(
        cls,
        adamw: torch.optim.AdamW,
        model: nn.Module,
        rate: float,
        product_dtype: torch.dtype,
        documents: int = 1,
        processes: int = 1,
        by_row: bool = False,
    ) -> AdamWWithMuon:
        """Replaces `adamw`, which must not have made a step: hidden matrices of `model` learn by Muon at `rate` times
        its rate, embeddings of tokens with a second moment for each row if `by_row`, all else as before."""
        # This default makes Adam an AdamW; the constructor of AdamW does not take it.
        options = {name: value for name, value in adamw.defaults.items() if name != "decoupled_weight_decay"}
        optimizer = cls(adamw.param_groups, product_dtype, documents, processes, **options)
        hidden = hidden_matrices(model)
        matrices = [each for each in hidden if each.ndim == 2]
        # Kept in checkpoints: a resumed run goes on with the turns that it had.
        together = {}
        if documents > 1 and matrices:
            between = min(steps_between(matrix, documents) for matrix in matrices)
            together = {"together": -(-len(matrices) // between)}
        set_apart(optimizer, matrices, rate, muon=True, steps=0, **together)
        # Parameters that hold the matrices of several experts stay with AdamW.
        set_apart(optimizer, [each for each in hidden if each.ndim > 2], rate)
        if by_row:
            set_apart(optimizer, token_embeddings(model), 1.0, rows=True)
        return optimizer

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The matrices that learn by Muon. Each changes only at the steps of its turn."""
        return [matrix for group in self._groups("muon") for matrix in group["params"]]

    def _groups(self, kind: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if _kind(group) == kind]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Adam's method reads state of every parameter that parameters of the other kinds do not have.
        groups = state["param_groups"]
        super().__setstate__(state | {"param_groups": [group for group in groups if _kind(group) == "adamw"]})
        self.param_groups = groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update everything by one step; of Muon's matrices only those whose turn it is."""
        groups = self.param_groups
        self.param_groups = self._groups("adamw")
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in self._groups("rows"):
            self._step_rows(group)
        for group in self._groups("muon"):
            self._step_matrices(group)
        return loss

    @torch.no_grad()
    def _step_rows(self, group: dict[str, Any]) -> None:
        """AdamW, with a second moment for each row: the mean of the squares of its gradient, moved towards the mean of
        all rows."""
        beta1, beta2 = group["betas"]
        grad_scale, found_inf = self._told("grad_scale"), self._told("found_inf")
        for embedding in group["params"]:
            if embedding.grad is None:
                continue
            average, moment, steps = self._state_of_rows(embedding)
            # 0 if the step is to be skipped, as below. A tensor in any case, so that the rounding is the same.
            made = torch.ones_like(steps) if found_inf is None else 1.0 - found_inf
            gradient, own = _local(embedding.grad), _local(moment)
            squares = torch.linalg.vector_norm(gradient, dim=1, keepdim=True).square() / gradient.shape[1]
            if grad_scale is not None:
                squares = squares / grad_scale**2
            if found_inf is not None:
                squares = torch.where(found_inf == 0, squares, own)
            # After the squares: on a GPU its kernel writes the unscaled gradient back.
            self._take_in([_local(average)], [gradient], 1.0 - beta1)
            own.lerp_(squares, 1.0 - beta2)
            steps += made
            of_all = _sum(moment) / embedding.shape[0]
            second = own ** (1.0 - TOWARDS_ALL_TOKENS) * of_all**TOWARDS_ALL_TOKENS / (1.0 - beta2**steps)
            if group["weight_decay"]:
                _local(embedding).mul_(1.0 - made * (group["lr"] * group["weight_decay"]))
            length = made * group["lr"] / (1.0 - beta1**steps)
            _local(embedding).addcmul_(_local(average), -length / (second.sqrt() + group["eps"]))

    def _state_of_rows(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The average of its gradients, the second moment of each row (V, 1), and the steps that it made."""
        state = self.state[embedding]
        if not state:
            state["exp_avg"] = torch.zeros_like(embedding)
            state["row_moment"] = _column_of(embedding)
            state["step"] = torch.zeros((), dtype=torch.float32, device=embedding.device)
        return state["exp_avg"], state["row_moment"], state["step"]

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        # Steps with a gradient that is not finite count too: found_inf is on the device, and reading it would wait.
        group["steps"] += 1
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        if not matrices:
            return
        averages = [self._average_of(matrix) for matrix in matrices]
        gradients = [_local(matrix.grad) for matrix in matrices]
        self._take_in([_local(average) for average in averages], gradients, 1.0 - MOMENTUM**self._documents)
        found_inf = self._told("found_inf")
        # 0 if the step is to be skipped. It stays on the device, so that nothing waits.
        made = 1.0 if found_inf is None else 1.0 - found_inf

        def update_of(average: torch.Tensor) -> torch.Tensor:
            update = orthogonal(average, self._product_dtype)
            # The floor keeps the update 0 if there was no gradient so far.
            return update * (made / update.square().mean().sqrt().clamp(min=1e-6))

        due: list[tuple[torch.Tensor, ...]] = []
        lengths: list[float] = []
        turns = _turns([matrix.shape for matrix in matrices], group.get("together", 1))
        for turn, matrix, average in zip(turns, matrices, averages, strict=True):
            between = steps_between(matrix, self._documents)
            if (group["steps"] + turn) % between:
                continue
            if group["weight_decay"]:
                _local(matrix).mul_(1.0 - made * (group["lr"] * group["weight_decay"] * between))
            parts = [(matrix, average)] if isinstance(matrix, DTensor) else list(_squarer(matrix, average))
            due += parts
            lengths += [-UPDATE_RMS * group["lr"] * between] * len(parts)
        updates = self._updates([average for _, average in due], update_of)
        for (matrix, _), length, update in zip(due, lengths, updates, strict=True):
            _local(matrix).add_(update, alpha=length)

    def _updates(self, averages: list[torch.Tensor], update_of: shared_turns.Make) -> Iterable[torch.Tensor]:
        """The update of each average; one after the other in one process, or this process' rows if sharded."""
        shards = [average for average in averages if isinstance(average, DTensor)]
        if shards:

            def of_whole(average: torch.Tensor) -> torch.Tensor:
                return torch.cat([update_of(part) for (part,) in _squarer(average)], dim=1)

            return shared_turns.of_shards(shards, of_whole, self._product_dtype)
        if self._processes > 1:
            return shared_turns.of_copies(averages, update_of, self._product_dtype)
        return map(update_of, averages)

    def _told(self, name: str) -> torch.Tensor | None:
        """`grad_scale` or `found_inf`; None if the trainer has not set it."""
        return getattr(self, name, None)

    def _average_of(self, matrix: torch.Tensor) -> torch.Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]

    def _take_in(self, averages: list[torch.Tensor], gradients: list[torch.Tensor], share: float) -> None:
        """Move each average towards the gradient by `share`, unscaled as in AdamW."""
        if not (self.defaults["fused"] and scales_in_kernel(self, averages[0].device)):
            torch._foreach_lerp_(averages, gradients, share)
            return
        # An exponential average is gradient ascent with weight decay, and so one pass of the fused SGD kernel.
        grad_scale, found_inf, scale = self._told("grad_scale"), self._told("found_inf"), 1.0
        if grad_scale is not None and grad_scale.device.type == "cpu":
            # Passed as a tensor, it would make the kernel write the unscaled gradient back.
            scale, grad_scale = grad_scale.item(), None
        torch._fused_sgd_(
            averages, gradients, [], lr=share / scale, weight_decay=scale, maximize=True, grad_scale=grad_scale,
            found_inf=found_inf, momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False,
        )  # fmt: skip


def steps_between(matrix: torch.Tensor, documents: int = 1) -> int:
    """Steps of `documents` each from one update of a matrix to its next, at least 1."""
    return max(1, max(DOCUMENTS_BETWEEN, min(matrix.shape) // 16) // documents)


def _turns(shapes: Sequence[torch.Size], together: int) -> list[int]:
    """How many steps before the first matrix the turn of each comes. `together`: how many have it at once; these cost
    about the same, so that several processes share their updates well."""
    if together == 1:
        return list(range(len(shapes)))
    by_cost = sorted(range(len(shapes)), key=lambda place: (-shared_turns.cost(shapes[place]), place))
    turns = [0] * len(shapes)
    for position, place in enumerate(by_cost):
        turns[place] = position // together
    return turns


def _kind(group: dict[str, Any]) -> str:
    """By what the parameters of a group learn."""
    return "muon" if group.get("muon", False) else "rows" if group.get("rows", False) else "adamw"


def _column_of(matrix: torch.Tensor) -> torch.Tensor:
    """Zeros, one for each row of a matrix, (rows, 1); sharded like it."""
    zeros = torch.zeros_like(_local(matrix)[:, :1])
    if not isinstance(matrix, DTensor):
        return zeros
    shape = torch.Size((matrix.shape[0], 1))
    return DTensor.from_local(zeros, matrix.device_mesh, matrix.placements, shape=shape, stride=(1, 1))


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, over all processes if the tensor is sharded."""
    total = tensor.sum()
    return total.full_tensor() if isinstance(total, DTensor) else total


def _local(tensor: Any) -> torch.Tensor:
    """The rows of a sharded matrix that this process has; any other matrix itself. To change the result in place
    changes `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _squarer(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same parts of each tensor: GPT-2 keeps queries, keys and values in one matrix, (D, 3D)."""
    rows, columns = tensors[0].shape
    count = 3 if columns == 3 * rows else 1
    return zip(*(tensor.chunk(count, 1) for tensor in tensors), strict=True)


def orthogonal(matrix: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """About a multiple of the nearest (semi-)orthogonal matrix, in `dtype`: the same singular vectors, and singular
    values close to each other. Computed by products alone (Newton-Schulz)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype)
    # No singular value may be above 1, rounding included.
    x = x / (1.01 * x.norm() + 1e-7)
    wide = x.shape[1] >= 2 * x.shape[0]
    for _ in range(_ITERATIONS // 2):
        x = _two_iterations_of_wide(x) if wide else _iteration(_iteration(x))
    return x.T if tall else x


def _iteration(x: torch.Tensor) -> torch.Tensor:
    """(a I + b S + c S^2) x with S = x x^T."""
    a, b, c = _POLYNOMIAL
    square = x @ x.T
    return torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)


def _two_iterations_of_wide(x: torch.Tensor) -> torch.Tensor:
    """Two iterations for (m, n) with n far above m: they are combined into one (m, m) factor of x.

    The second iteration's S is first @ S @ first, because all of these commute. For m = 768, n = 3,072 this takes 0.7
    of the time. In bfloat16 the result is 1.3 % from the exact one, that of separate iterations 0.7 %. Combining more
    than two would lose what is small in S.
    """
    a, b, c = _POLYNOMIAL
    square = x @ x.T
    first = torch.addmm(square, square, square, beta=b, alpha=c)
    first.diagonal().add_(a)
    square = first @ square @ first
    second = torch.addmm(square, square, square, beta=b, alpha=c)
    return torch.addmm(first, second, first, beta=a) @ x
