"""The program with eyes: which precisions the products of its steps, and of what is shown beside them, are made in.

    python -m tests.seen_precision FLAGS OF run_clm_slimpajama.py -- OTHER FLAGS ...

Each group of flags is a run. For each a line `SEEN {...}` on stdout: `exit`, `step` (of the steps), `shown` (of samples,
passports, prompts and scores). Modules tell by forward hooks. The step that is written out calls no module: of that the
operators tell.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.conftest import ROOT


def main(groups: list[list[str]]) -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers.pytorch_utils import Conv1D

    from slimpajama_hf import precision, program
    from slimpajama_hf.model.gpt2_step import GPT2Step

    sys.path.insert(0, str(ROOT))
    import run_clm_slimpajama

    products = {"mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"}
    seen: dict[str, set[str]] = {}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operator(*args, **(kwargs or {}))
            if operator.overloadpacket.__name__ in products:
                seen["step"].add(str(result.dtype).removeprefix("torch."))
            return result

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Linear | Conv1D):
            seen["step" if module.training else "shown"].add(str(output.dtype).removeprefix("torch."))

    torch.nn.modules.module.register_module_forward_hook(hook)
    look = precision.seen_by_a_hook

    def looked(*args: Any) -> str:
        # The program's own look at itself is neither a step nor shown.
        before = {where: set(names) for where, names in seen.items()}
        try:
            return look(*args)
        finally:
            seen.update(before)

    precision.seen_by_a_hook = looked
    run = GPT2Step._run

    def watched(self: GPT2Step, *args: Any, **kwargs: Any) -> Any:
        with Products():
            return run(self, *args, **kwargs)

    GPT2Step._run = watched  # type: ignore[method-assign]
    for flags in groups:
        seen.update(step=set(), shown=set())
        sys.argv = ["run_clm_slimpajama.py", *flags]
        code = program.run(run_clm_slimpajama.main)
        sys.stdout.write(
            "SEEN " + json.dumps({"exit": code, **{where: sorted(names) for where, names in seen.items()}}) + "\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    groups: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    main(groups)
