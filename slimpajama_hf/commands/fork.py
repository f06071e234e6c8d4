"""`fork RUN --from N --a FLAGS --b FLAGS`: try two ways to go on, over the same documents (`lookback/fork.py`)."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import bars, palette, screen, terminal
from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings.arguments import positive

if TYPE_CHECKING:
    from slimpajama_hf.lookback.fork import Difference, Fork, Pair

HELP = "two ways to go on from a checkpoint, over the same documents: which is better, and how sure that is"

#: Weights of an arm's end that are scored.
_WEIGHTS = ("last weights", "averaged weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `fork`."""
    parser.add_argument("run", help="a run folder")
    parser.add_argument(
        "--from", dest="starts", type=int, nargs="+", required=True, metavar="N",
        help="step of a checkpoint to go on from, 0 for the very start; several: a fork at each",
    )  # fmt: skip
    parser.add_argument("--a", default="", metavar="FLAGS", help="flags of training that arm a changes [none]")
    parser.add_argument("--b", required=True, metavar="FLAGS", help="the same for arm b, as '--learning_rate 5e-4'")
    parser.add_argument("--documents", type=positive, default=1000, help="steps of each arm [1000]")
    parser.add_argument(
        "--score", type=int, default=200, metavar="K",
        help="next documents, on which the final weights of both arms are scored; 0: none [200]",
    )  # fmt: skip
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the arms' runs [RUN-fork]")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Run `fork RUN --from N --b FLAGS`. Returns 0, whatever the verdict is."""
    from slimpajama_hf.lookback import fork

    if len(set(options.starts)) < len(options.starts) or min(options.starts) < 0:
        raise UsageError(f"--from {' '.join(map(str, options.starts))}: expected steps of checkpoints, each once")
    flags = {"a": options.a, "b": options.b}
    for name, words in flags.items():
        # Checked before anything is trained.
        fork.refuse_flags(name, words, options.starts)
    run = Path(options.run)
    output = Path(options.output_dir or run.with_name(f"{run.resolve().name}-fork")).expanduser()
    forks = [fork.fork(run, start, flags, options.documents, output) for start in options.starts]
    ends = [_score_ends(each, options.score) for each in forks] if options.score else []
    found: dict[str, Sequence[Sequence[Pair]]] = {"each document before it is learned": [each.pairs for each in forks]}
    for weights in _WEIGHTS:
        if ends and all(weights in each for each in ends):
            found[f"the next {options.score:,} documents, {weights}"] = [each[weights] for each in ends]
    if options.json:
        sys.stdout.write(json.dumps(_to_dict(forks, flags, found), indent=1) + "\n")
    else:
        _show(forks, flags, found)
    return 0


def _score_ends(made: Fork, documents: int) -> dict[str, list[Pair]]:
    """Score the weights of both arms on the next documents of the stream, which neither has learned. Returns name of
    the weights -> one pair of losses per document."""
    import torch
    from transformers import AutoModelForCausalLM

    from slimpajama_hf.lookback.fork import Pair
    from slimpajama_hf.model import averaging
    from slimpajama_hf.model.presets import vocabulary
    from slimpajama_hf.record import checkpoints
    from slimpajama_hf.training.evaluation import score

    screen.quiet_libraries()
    ends = {name: checkpoints.resolve(str(arm)) for name, arm in made.arms.items()}
    samples = list(itertools.islice(_stream_behind(made.arms["a"], ends["a"]), documents))
    size = vocabulary(_tokenizer(ends["a"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    averaged = all((end / averaging.FOLDER / "config.json").is_file() for end in ends.values())
    losses: dict[str, dict[str, list[float]]] = {}
    with bars.Counting("Scoring the next documents", len(samples) * 2 * (1 + averaged)) as counting:
        done = 0
        for weights, inside in zip(_WEIGHTS[: 1 + averaged], ("", averaging.FOLDER), strict=False):
            for name, end in ends.items():
                model: Any = AutoModelForCausalLM.from_pretrained(str(end / inside), trust_remote_code=False)
                model.to(device)
                own = losses.setdefault(weights, {}).setdefault(name, [])
                for sample in samples:
                    own.append(score(model, [sample], size)["all"].loss)
                    done += 1
                    counting(done)
    domains = [sample.document.domain for sample in samples]
    return {
        weights: [Pair(*each) for each in zip(domains, arms["a"], arms["b"], strict=True)]
        for weights, arms in losses.items()
    }


def _tokenizer(checkpoint: Path) -> Any:
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    return load_tokenizer(str(checkpoint))


def _stream_behind(arm: Path, checkpoint: Path) -> Any:
    """The samples of an arm's run that come after its checkpoint."""
    from slimpajama_hf.lookback import reread
    from slimpajama_hf.lookback.run import Run
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.session.command_line import parse
    from slimpajama_hf.session.resume import cursor_of, stream_as_asked

    settings = parse(["--output_dir", str(arm), "--resume_from_checkpoint", "true"])
    corpus, encoder = reread.corpus_of(Run(arm).record), Encoder(_tokenizer(checkpoint))
    return stream_as_asked(settings, corpus, encoder, read_ahead=0, start=cursor_of(checkpoint))


# ---- showing ----


def _domains(forks: Sequence[Sequence[Pair]]) -> list[tuple[str, Difference]]:
    """The difference in each domain. The domain with the most documents comes first."""
    from slimpajama_hf.lookback.fork import difference_of

    domains = {pair.domain for pairs in forks for pair in pairs}
    found = [(each, difference_of([[pair for pair in pairs if pair.domain == each] for pairs in forks]))
             for each in sorted(domains)]  # fmt: skip
    return sorted(found, key=lambda entry: -entry[1].documents)


def _show(forks: Sequence[Fork], flags: dict[str, str], found: dict[str, Sequence[Sequence[Pair]]]) -> None:
    from rich.text import Text

    from slimpajama_hf.lookback.fork import difference_of

    drawn = terminal.console()
    for name, words in flags.items():
        drawn.print(Text(terminal.visible(f"{name}: {words or 'as it was'}", line_ends=False)))
    right = {"justify": "right", "no_wrap": True}
    table = terminal.grid(
        {"header": "a's loss less b's, nats per token (above 0: b is better)"}, {"header": "documents", **right},
        {"header": "mean", **right}, {"header": "± standard error", **right},
    )  # fmt: skip
    for what, pairs in found.items():
        for title, each in [
            (what, difference_of(pairs)),
            *((f"  {palette.domain_name(d)}", e) for d, e in _domains(pairs)),
        ]:
            table.add_row(
                Text(terminal.visible(title, line_ends=False)),
                f"{each.documents:,}",
                f"{each.mean:+.4f}",
                terminal.number(each.error, ".4f"),
            )
    drawn.print(table)
    for what, pairs in found.items():
        drawn.print(Text(difference_of(pairs).words(what), "bold"))
    for made in forks:
        drawn.print(Text(f"runs: {made.arms['a']} and {made.arms['b']}"))
        for note in made.notes:
            drawn.print(Text(f"note: {terminal.visible(note, line_ends=False)}", "italic"))


def _to_dict(
    forks: Sequence[Fork], flags: dict[str, str], found: dict[str, Sequence[Sequence[Pair]]]
) -> dict[str, Any]:
    from slimpajama_hf.lookback.fork import difference_of

    return {
        "flags": flags,
        "forks": [
            {"from": each.start, "arms": {name: str(arm) for name, arm in each.arms.items()}, "notes": each.notes}
            for each in forks
        ],
        "differences": {
            what: difference_of(pairs).to_dict()
            | {
                "verdict": difference_of(pairs).words(what),
                "by_domain": {domain: each.to_dict() for domain, each in _domains(pairs)},
            }
            for what, pairs in found.items()
        },
    }
