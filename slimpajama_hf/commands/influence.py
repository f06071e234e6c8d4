"""`influence RUN --text T`: find which documents moved the loss of a text, by training without them."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import bars, palette, screen, terminal
from slimpajama_hf.errors import UserError
from slimpajama_hf.settings.arguments import positive

if TYPE_CHECKING:
    from slimpajama_hf.lookback.influence import Candidate, Window
    from slimpajama_hf.lookback.run import Run

HELP = "which documents moved the loss of a text: gradients choose some, and training without each of them says"

#: Documents with the least effect by their gradients. They are left out too, to show how small an effect means none.
CONTROLS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `influence`."""
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--text", required=True, help="the text whose loss is looked at")
    parser.add_argument("--step", type=positive, metavar="S", help="look back from step S; default: the end of the run")
    parser.add_argument("--documents", type=positive, default=100, help="documents before it that are looked at [100]")
    parser.add_argument("--drops", type=positive, default=5, help="how many of these are really left out [5]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Run `influence RUN --text T`."""
    from slimpajama_hf.lookback import influence
    from slimpajama_hf.lookback.run import Run

    screen.quiet_libraries()
    run = Run(options.run)
    window = influence.window_of(run, options.step, options.documents)
    with tempfile.TemporaryDirectory(prefix="slimpajama_hf-influence-") as place:
        whole = influence.train(run, window, [], Path(place) / "whole")
        text, candidates = _candidates(run, window, options.text, whole)
        _estimate(run, window, candidates, text, whole)
        loss = _loss(whole, text)
        by_size = sorted(candidates, key=lambda each: -abs(each.estimate))
        tried = by_size[: options.drops]
        controls = by_size[max(options.drops, len(by_size) - CONTROLS) :]
        for number, each in enumerate([*tried, *controls], 1):
            screen.say(f"without {each.name} ({number} of {len(tried) + len(controls)})")
            folder = Path(place) / f"without-{number}"
            each.effect = _loss(influence.train(run, window, [each.name], folder), text) - loss
    if options.json:
        sys.stdout.write(json.dumps(_to_dict(window, loss, candidates, controls), indent=1) + "\n")
    else:
        _show(window, loss, tried, controls)
    return 0


def _candidates(run: Run, window: Window, text: str, checkpoint: Path) -> tuple[list[int], list[Candidate]]:
    """Return the tokens of the text, and the documents of the window with their tokens. Raises UserError for a text of
    fewer than 2 tokens."""
    from slimpajama_hf.lookback import reread
    from slimpajama_hf.lookback.influence import Candidate
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(str(checkpoint)))
    length = run.record["model"]["max_seq_length"]
    ids = encoder.opening(text, length).ids
    if len(ids) < 2:
        raise UserError(f"--text: {len(ids)} tokens; expected a text of 2 tokens or more")
    reader = reread.Rereader(reread.corpus_of(run.record))
    places = [reread.places(row, "truncate", length)[0] for row in window.rows]
    found = [
        Candidate(row, encoder.opening(reader.read(place).text, length).ids)
        for row, place in zip(window.rows, places, strict=True)
    ]
    return ids, found


def _estimate(run: Run, window: Window, candidates: list[Candidate], text: list[int], checkpoint: Path) -> None:
    """Fill in what the gradients at the end of the window estimate."""
    from slimpajama_hf.model import influence_estimate
    from slimpajama_hf.session.command_line import parse

    settings = parse(["--output_dir", str(checkpoint.parent), "--resume_from_checkpoint", "true"])
    with bars.Counting("Gradients of the documents", 2 * len(candidates)) as counting:
        found = influence_estimate.estimate(
            _load(checkpoint), text, [each.ids for each in candidates], settings.rules,
            settings.training.max_grad_norm, counting,
        )  # fmt: skip
    for each, value in zip(candidates, found, strict=True):
        each.estimate = value


def _load(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(checkpoint), trust_remote_code=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _loss(checkpoint: Path, ids: list[int]) -> float:
    """Loss of the text in nats per token, by the last weights of a checkpoint."""
    import torch

    model = _load(checkpoint).eval()
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


# ---- showing ----


def control_effect(controls: list[Candidate]) -> tuple[float, float]:
    """Mean and standard deviation of the effect of the controls, in nats per token. One step less moves the loss of a
    text too, whatever that step learned. (0, 0) if no control was left out."""
    effects = [each.effect or 0.0 for each in controls] or [0.0]
    return statistics.fmean(effects), statistics.stdev(effects) if len(effects) > 1 else 0.0


def _show(window: Window, loss: float, tried: list[Candidate], controls: list[Candidate]) -> None:
    from rich.text import Text

    drawn = terminal.console()
    drawn.print(Text(f"the text has a loss of {loss:.4f} nats per token at step {window.end:,}; looked back over "
                     f"{len(window.rows):,} documents, from step {window.rows[0]['step']:,} on"))  # fmt: skip
    right = {"justify": "right", "no_wrap": True}
    table = terminal.grid(
        {"header": "step", **right}, {"header": "estimate", **right}, {"header": "loss without it", **right},
        {"header": "document", "overflow": "fold"},
    )  # fmt: skip
    for each in [*sorted(tried, key=lambda each: -(each.effect or 0.0)), *controls]:
        words = f"{palette.domain_name(each.row['domain'])}, {each.name}" + (" (control)" if each in controls else "")
        table.add_row(
            f"{each.row['step']:,}",
            f"{each.estimate:+.3g}",
            f"{each.effect:+.4f}",
            Text(terminal.visible(words, line_ends=False)),
        )
    drawn.print(table)
    mean, spread = control_effect(controls)
    clear = [each for each in tried if abs((each.effect or 0.0) - mean) > 2 * spread]
    drawn.print(Text("above 0: it had helped. Without a document that should not matter (control) the loss moves by "
                     f"{mean:+.4f} ± {spread:.4f}: {len(clear)} of the {len(tried)} stand out from that"))  # fmt: skip


def _to_dict(window: Window, loss: float, candidates: list[Candidate], controls: list[Candidate]) -> dict[str, Any]:
    return {
        "loss": loss,
        "started_at": window.start,
        "step": window.end,
        "control_effect": dict(zip(("mean", "deviation"), control_effect(controls), strict=True)),
        "documents": [
            {"document": each.name, "step": each.row["step"], "domain": each.row["domain"], "estimate": each.estimate,
             "effect": each.effect, "control": each in controls}
            for each in candidates
        ],
    }  # fmt: skip
