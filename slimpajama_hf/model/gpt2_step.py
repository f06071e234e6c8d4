"""GPT-2's forward and backward on one sample, written out: the same arithmetic as autograd's with less memory traffic.

Why it is faster (figures of 2 CPU cores in benchmarks/results):
- Gradients are written into one buffer that lives as long as the run. None is zeroed, summed or allocated anew, and the
  tied embedding gets one dense gradient where autograd makes two and adds them.
- Softmax of the logits, loss and gradient share one buffer and are computed in place. The surprisal of every token and
  the count of correct guesses come from it at no cost.
- The norm for clipping is taken from the gradient buffer; on a CPU from each matrix while it is in the cache. The
  optimizer scales gradients while it reads them (`grad_scale`).
- GELU's tanh is computed as an equal sigmoid, at a third of the cost. Its backward is only multiplications.
- Attention of up to 512 tokens on a CPU is three products per head. Its backward is cheaper than the fused kernel's.
- Each product is made by the fastest library, and weights that change seldom are kept in its layout (`products.py`).
- There are no modules, hooks or autograd graph. On CUDA the whole step is captured and replayed as one graph.

The function is the same: losses and gradients agree with `GPT2LMHeadModel` to float32 rounding
(tests/model/test_gpt2_step.py). In bfloat16 the casts are where autocast has them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from slimpajama_hf.model import cuda_graph, transfers
from slimpajama_hf.model.attention import (
    ATTENTION_BLOCK,
    LONGEST_EXPLICIT_ATTENTION,
    LOW_ATTENTION_BLOCK,
    fused_attention,
    gelu,
)
from slimpajama_hf.model.gpt2_likeness import unsupported
from slimpajama_hf.model.products import Weights, product, product_into, square

#: The dtype of products, by the name of the precision; None: that of the weights.
LOW_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: In low precision on a CPU samples are padded to multiples of this length: oneDNN prepares and keeps products per
#: length, which takes longer than computing the padding.
LENGTH_STEP = 32

#: In low precision on other devices the head is padded to a multiple of this many words, because rows of logits with
#: unaligned beginnings are multiplied far slower. The added words get no probability and no gradient.
VOCABULARY_STEP = 64


@dataclasses.dataclass
class Result:
    """What a step returns, on the device; the gradients are in `GPT2Step.gradients`."""

    loss: torch.Tensor
    """Mean over the predicted tokens, nats; ()."""
    correct: torch.Tensor
    """Tokens guessed right; ()."""
    nats: torch.Tensor
    """Surprisal of each predicted token; at least (tokens - 1,), the rest is padding."""


class GPT2Step:
    """Forward and backward of a `GPT2LMHeadModel`; every call overwrites the gradients of all parameters.

    `precision`: `float32`, `bfloat16` or `float16`, the dtype of products; weights, norms, residual stream and loss are
    float32. `max_length`: tokens of the longest sample. On CUDA samples are padded to it and the step is captured as a
    graph (`cuda_graph.py`). If that is refused, `trouble` is called with a sentence and the step runs uncaptured.
    `seldom_changed`: parameters that most updates leave alone. They are cast only after a change, so nothing may change
    them behind autograd's back (`.data`).
    `scale`: float16's gradient scale, (), on the model's device, read at every step. `gradients` stay multiplied by it;
    no other result is. `weight`: the share of this sample in the gradient of a step of several samples, (), on the
    device, read at every step. The loss does not include it. `gradients`: the row to keep them in, float32
    (parameters,), on the device; by default a new one.
    """

    def __init__(
        self,
        model: Any,
        precision: str,
        max_length: int,
        trouble: Callable[[str], None] = lambda text: None,
        seldom_changed: Iterable[nn.Parameter] = (),
        scale: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        gradients: torch.Tensor | None = None,
    ) -> None:
        reason = unsupported(model)
        if reason is not None:
            raise ValueError(f"this step is written out for GPT-2; {reason}")
        config = model.config
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        self._low = LOW_PRECISIONS[precision]
        self.scale, self._weight = scale, weight
        self.filled: Callable[[int, int], None] = lambda first, last: None
        """An uncaptured step calls this with the first and one past the last element of each block's part of
        `gradients` as soon as that part is final, the last block first. All other parts are final at the end."""
        self._max_length = max_length
        self._trouble = trouble
        self._width, self._heads = config.hidden_size, config.num_attention_heads
        self._epsilon = config.layer_norm_epsilon
        size = sum(p.numel() for p in self._parameters)
        self.gradients = gradients if gradients is not None else torch.zeros(size, device=self._device)
        """All gradients in one row, in the order of `model.parameters()`, times `scale`."""
        self._views = [
            piece.view_as(p)
            for piece, p in zip(
                self.gradients.split([p.numel() for p in self._parameters]), self._parameters, strict=True
            )
        ]
        place = {id(p): index for index, p in enumerate(self._parameters)}
        self._place = lambda parameter: place[id(parameter)]
        self._head = self._place(model.lm_head.weight)
        self._words = columns = len(model.lm_head.weight)
        if self._low is not None and self._device.type != "cpu":
            columns = -(-columns // VOCABULARY_STEP) * VOCABULARY_STEP
        self._weights = Weights(self._parameters, self._low, seldom_changed, max_length, {self._head: columns})
        # Squared norms that the last backward computed, by place, and the version of `gradients` they belong to.
        self._squares: dict[int, torch.Tensor] = {}
        self._squares_version = -1
        transformer = model.transformer
        self._blocks = list(transformer.h)
        self._stretches = [self._stretch(block) for block in self._blocks]
        self._scaling = [block.attn.scaling for block in self._blocks]
        self._wte, self._wpe = self._place(transformer.wte.weight), self._place(transformer.wpe.weight)
        self._final = transformer.ln_f
        self._positions_used = 0
        self._mask = torch.full((1, 1), 0.0, device=self._device)
        self._replayed: cuda_graph.Replayed | None = None
        self._record = cuda_graph.recorder_of(self._device)
        """Captures a step. None if this device cannot, or after a capture was refused."""

    def __call__(self, input_ids: torch.Tensor) -> Result:
        """One step on `input_ids` (T,), 2 <= T <= max_length. Sets `.grad` of all parameters. Ids on the host are
        copied without waiting for the device. Raises torch.OutOfMemoryError."""
        with torch.no_grad():
            self._weights.refresh()
            result = self._by_graph(input_ids)
            if result is None:
                result = self._run(*self._arguments(input_ids))
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view
        return result

    def computes_in(self) -> str:
        """The dtype of its products, such as `bfloat16`, observed by computing one."""
        with torch.no_grad():
            self._weights.refresh()
            hidden = self._lowered(torch.zeros(2, self._width, device=self._device))
            return str(self._linear(self._blocks[0].attn.c_attn, hidden).dtype).removeprefix("torch.")

    def loss_alone(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The loss of a step on `input_ids`, (), equal to the bit, by a forward alone. A captured step is replayed as a
        whole, which overwrites the gradients."""
        if self._record is not None:
            return self(input_ids).loss
        with torch.no_grad():
            self._weights.refresh()
            return self._run(*self._arguments(input_ids), backward=False).loss

    def _stretch(self, block: nn.Module) -> tuple[int, int]:
        """The first and one past the last element of a block's gradients in `gradients`."""
        begins = [0, *itertools.accumulate(view.numel() for view in self._views)]
        places = [self._place(parameter) for parameter in block.parameters()]
        if places != list(range(places[0], places[-1] + 1)):
            raise ValueError("the parameters of a block do not follow one another")
        return begins[places[0]], begins[places[-1] + 1]

    def were_changed(self, squares: torch.Tensor | None = None) -> None:
        """Tell this step that something changed `gradients` after the backward. `squares`: the squared L2 norm of each
        parameter's gradient as it is now, (parameters,), if known."""
        self._squares_version = self.gradients._version if squares is not None else -1
        self._squares = {} if squares is None else dict(enumerate(squares))

    def _padded(self, tokens: int) -> int:
        """The length at which a sample of `tokens` is computed. Padding has no share in the loss, and causal attention
        keeps all tokens from seeing it."""
        if self._low is None or self._device.type != "cpu":
            return tokens
        return max(tokens, min(-(-tokens // LENGTH_STEP) * LENGTH_STEP, self._max_length))

    def squared_norms(self, row: torch.Tensor | None = None) -> torch.Tensor:
        """Squared L2 norm of each parameter's gradient without `scale`, (parameters,), on the device. With `row`, a
        tensor in the layout of `gradients` that is not scaled: the norms of its parts."""
        if row is None and self.scale is not None:
            return self._squared_norms_as_they_lie(None) / self.scale.square()
        return self._squared_norms_as_they_lie(row)

    def _squared_norms_as_they_lie(self, row: torch.Tensor | None) -> torch.Tensor:
        pieces = self._views if row is None else list(row.split([view.numel() for view in self._views]))
        if self._device.type != "cpu":
            return torch.stack(torch._foreach_norm(pieces)).square()
        there = self._squares if row is None and self.gradients._version == self._squares_version else {}
        return torch.stack([there[place] if place in there else square(piece) for place, piece in enumerate(pieces)])

    # ---- the inputs of a step ----

    def _by_graph(self, input_ids: torch.Tensor) -> Result | None:
        """The step by replaying its graph; None if it is not captured."""
        if self._record is None:
            return None
        if self._replayed is None:
            try:
                self._replayed = cuda_graph.Replayed(
                    self._run, self._shares, self._max_length, self._device, self._record
                )
            except cuda_graph.Refused as why:
                self._record = None
                self._trouble(f"the step runs without a CUDA graph, somewhat slower: it could not be captured ({why})")
                return None
        return self._replayed(input_ids)

    def _arguments(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The arguments of `_run` for a step that is not captured."""
        tokens, length = input_ids.numel(), self._padded(input_ids.numel())
        padded = F.pad(input_ids, (0, length - tokens)) if length > tokens else input_ids
        return transfers.to_device(padded, self._device), self._shares(tokens, length)

    def _shares(self, tokens: int, length: int) -> torch.Tensor:
        """Weight of each position in the loss, (length,): 1/(tokens - 1) where a token is predicted, else 0."""
        shares = torch.zeros(length, device=self._device)
        shares[: tokens - 1] = 1.0 / (tokens - 1)
        return shares

    # ---- the arithmetic ----

    def _lowered(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._low is None else values.to(self._low)

    def _linear(self, module: Any, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs @ W + b` of a Conv1D, W of shape (in, out)."""
        return self._weights.linear(inputs, self._place(module.weight), self._place(module.bias))

    def _linear_backward(self, module: Any, inputs: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Writes the gradients of W and b into `gradients`; returns that of the inputs."""
        weight = self._place(module.weight)
        self._gradient_product(weight, inputs.t(), gradient)
        torch.sum(gradient, 0, dtype=torch.float32, out=self._views[self._place(module.bias)])
        return self._weights.linear_backward(gradient, weight)

    def _gradient_product(self, weight: int, left: torch.Tensor, right: torch.Tensor) -> None:
        squared = product_into(self._views[weight], left, right)
        if squared is not None:
            self._squares[weight] = squared

    def _norm(self, module: Any, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.native_layer_norm(inputs, (self._width,), module.weight, module.bias, self._epsilon)

    def _norm_backward(
        self, module: Any, gradient: torch.Tensor, inputs: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
    ) -> torch.Tensor:
        of_inputs, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient, inputs, (self._width,), mean, rstd, module.weight, module.bias, (True, True, True)
        )
        self._views[self._place(module.weight)].copy_(of_weight)
        self._views[self._place(module.bias)].copy_(of_bias)
        return of_inputs

    def _run(self, input_ids: torch.Tensor, shares: torch.Tensor, backward: bool = True) -> Result:
        """Forward and backward of ids (T,); `shares` (T,) is the weight of each position in the loss."""
        length = input_ids.numel()
        x = torch.embedding(self._parameters[self._wte], input_ids)  # (T, D)
        x += self._parameters[self._wpe][:length]
        kept = []
        for block, scaling in zip(self._blocks, self._scaling, strict=True):
            entered = x
            normed, mean, rstd = self._norm(block.ln_1, x)
            normed = self._lowered(normed)
            qkv = self._linear(block.attn.c_attn, normed)  # (T, 3D)
            attended, attention_back = self._attention(qkv, scaling)  # (T, D)
            x = x + self._linear(block.attn.c_proj, attended)
            middle = x
            normed_2, mean_2, rstd_2 = self._norm(block.ln_2, x)
            normed_2 = self._lowered(normed_2)
            active, activation_back = gelu(self._linear(block.mlp.c_fc, normed_2))  # (T, 4D)
            x = x + self._linear(block.mlp.c_proj, active)
            kept.append(
                (block, entered, normed, mean, rstd, attended, attention_back, middle, normed_2, mean_2, rstd_2,
                 active, activation_back)
            )  # fmt: skip
        result, dx = self._head_and_loss(x, input_ids, shares, backward)
        if not backward:
            return result
        while kept:
            (block, entered, normed, mean, rstd, attended, attention_back, middle, normed_2, mean_2, rstd_2,
             active, activation_back) = kept.pop()  # fmt: skip
            d = self._linear_backward(block.mlp.c_proj, active, self._lowered(dx))
            d = self._linear_backward(block.mlp.c_fc, normed_2, activation_back(d))
            dx += self._norm_backward(block.ln_2, d.float(), middle, mean_2, rstd_2)
            d = self._linear_backward(block.attn.c_proj, attended, self._lowered(dx))
            d = self._linear_backward(block.attn.c_attn, normed, attention_back(d))
            dx += self._norm_backward(block.ln_1, d.float(), entered, mean, rstd)
            self.filled(*self._stretches[len(kept)])
        self._embeddings_backward(input_ids, dx)
        self._squares_version = self.gradients._version
        return result

    def _attention(
        self, qkv: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Causal attention of all heads, (T, 3D) -> (T, D), and a function for its backward."""
        length = qkv.shape[0]
        size = self._width // self._heads
        if self._device.type != "cpu" or length > LONGEST_EXPLICIT_ATTENTION:
            return fused_attention(qkv, scaling, self._heads)
        # As in the fused kernel: products in `low`, softmax and sums in float32.
        low, block = qkv.dtype, ATTENTION_BLOCK

        def by_head(values: torch.Tensor) -> torch.Tensor:
            parts = values.view(length, -1, self._heads, size).permute(1, 2, 0, 3)  # (parts, H, T, d)
            # Products in low precision would copy each non-contiguous piece.
            return parts if low == torch.float32 else parts.contiguous()

        if low != torch.float32:
            block = LOW_ATTENTION_BLOCK
        query, key, value = by_head(qkv)  # (H, T, d) each
        blocks = [(first, min(first + block, length)) for first in range(0, length, block)]
        kept, outputs = [], []
        for first, last in blocks:
            mask = self._causal(length)[:, first:last, :last]
            if low == torch.float32:
                weights = torch.baddbmm(mask, query[:, first:last], key[:, :last].transpose(1, 2), alpha=scaling)
            else:
                scores = torch.bmm(query[:, first:last], key[:, :last].transpose(1, 2))
                weights = torch.add(mask, scores, alpha=scaling)
            torch.softmax(weights, -1, out=weights)
            lowered = weights.to(low)
            outputs.append(torch.bmm(lowered, value[:, :last]))
            kept.append((weights, lowered))
        attended = torch.cat(outputs, 1).transpose(0, 1).reshape(length, self._width)

        def back(gradient: torch.Tensor) -> torch.Tensor:
            (of_attended,) = by_head(gradient)  # (H, T, d)
            of_qkv = torch.empty_like(qkv)
            of_query, of_key, of_value = of_qkv.view(length, 3, self._heads, size).permute(1, 2, 0, 3)
            keys = values = None
            for (first, last), (weights, lowered) in reversed(list(zip(blocks, kept, strict=True))):
                part = of_attended[:, first:last]
                of_weights = torch.bmm(part, value[:, :last].transpose(1, 2)).float()
                scores = torch._softmax_backward_data(of_weights, weights, -1, torch.float32).mul_(scaling).to(low)
                of_query[:, first:last] = torch.bmm(scores, key[:, :last])
                if keys is None or values is None:
                    keys = torch.bmm(scores.transpose(1, 2), query[:, first:last])
                    values = torch.bmm(lowered.transpose(1, 2), part)
                    if len(blocks) > 1:
                        keys, values = keys.float(), values.float()
                elif low == torch.float32:
                    keys[:, :last].baddbmm_(scores.transpose(1, 2), query[:, first:last])
                    values[:, :last].baddbmm_(lowered.transpose(1, 2), part)
                else:
                    keys[:, :last] += torch.bmm(scores.transpose(1, 2), query[:, first:last])
                    values[:, :last] += torch.bmm(lowered.transpose(1, 2), part)
            of_key.copy_(keys)
            of_value.copy_(values)
            return of_qkv

        return attended, back

    def _causal(self, length: int) -> torch.Tensor:
        """The causal mask, (1, T, T): 0 where a position may look, -inf where it may not."""
        if self._mask.shape[0] < length:
            self._mask = torch.full((length, length), -math.inf, device=self._device).triu_(1)
        return self._mask[:length, :length].unsqueeze(0)

    def _head_and_loss(
        self, x: torch.Tensor, input_ids: torch.Tensor, shares: torch.Tensor, backward: bool
    ) -> tuple[Result, torch.Tensor]:
        """Result and gradient of `x` (T, D); writes the head's gradient. Without `backward`, `x` is returned as is."""
        hidden, mean, rstd = self._norm(self._final, x)
        hidden = self._lowered(hidden)
        head = self._weights.padded(self._head)  # (V or more, D)
        logits = product(hidden, head.t()).float()  # (T, V or more), the largest tensor of the step: changed in place
        if logits.shape[1] > self._words:
            logits[:, self._words :].fill_(-math.inf)
        targets = input_ids.roll(-1).unsqueeze(1)  # (T, 1); nothing is predicted at the last position, its share is 0
        highest = logits.amax(1, keepdim=True)
        of_target = logits.gather(1, targets)
        correct = self._guessed(logits, highest, of_target, targets, shares)
        torch.softmax(logits, 1, out=logits)
        # log p = logit - highest + log(softmax of the highest): finite even where the softmax of the target is 0.
        nats = (highest - of_target - logits.amax(1, keepdim=True).log()).squeeze(1)  # (T,)
        loss = torch.dot(nats, shares)
        if not backward:
            return Result(loss, correct, nats), x
        # The gradient of the mean loss: softmax minus one at the target, times the share.
        for factor in (self.scale, self._weight):
            shares = shares if factor is None else shares * factor
        logits.mul_(shares.unsqueeze(1))
        logits.scatter_add_(1, targets, -shares.unsqueeze(1))
        gradient = self._lowered(logits)
        self._gradient_product(self._head, gradient.t()[: self._words], hidden)
        of_hidden = product(gradient, head)
        return Result(loss, correct, nats), self._norm_backward(self._final, of_hidden.float(), x, mean, rstd)

    def _guessed(
        self,
        logits: torch.Tensor,
        highest: torch.Tensor,
        of_target: torch.Tensor,
        targets: torch.Tensor,
        shares: torch.Tensor,
    ) -> torch.Tensor:
        """How many targets are the likeliest token (the first of equals)."""
        if self._device.type != "cpu":
            return ((logits.argmax(1, keepdim=True) == targets).squeeze(1) & (shares > 0)).sum()
        # On a CPU `argmax` takes ten times as long as `amax`, so it runs only where the target has the highest logit.
        rows = ((of_target == highest).squeeze(1) & (shares > 0)).nonzero().squeeze(1)
        return (logits[rows].argmax(1, keepdim=True) == targets[rows]).sum()

    def _embeddings_backward(self, input_ids: torch.Tensor, gradient: torch.Tensor) -> None:
        words, positions = self._views[self._wte], self._views[self._wpe]
        tied = self._wte == self._head
        if not tied:
            words.zero_()
        if self._device.type == "cpu":
            rows = torch.unique(input_ids)
            before = square(words[rows]) if tied else 0.0
            words.index_add_(0, input_ids, gradient)
            changed = square(words[rows]) - before
            self._squares[self._wte] = self._squares[self._wte] + changed if tied else changed
        else:
            # It sorts, so that two runs add in the same order; `index_add_` is atomic there.
            words.index_put_((input_ids,), gradient, accumulate=True)
        length = gradient.shape[0]
        positions[:length].copy_(gradient)
        if length < self._positions_used:
            positions[length : self._positions_used].zero_()
        self._positions_used = length
