"""The other commands: `python -m slimpajama_hf --help` lists them, each has a `--help` of its own."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import NoReturn

from slimpajama_hf import cli
from slimpajama_hf.errors import UsageError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m slimpajama_hf", description="Look at what a run left, and make tokenizers.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    evaluate = commands.add_parser("evaluate", help="held-out loss, perplexity, accuracy, bits per byte, by domain")
    evaluate.add_argument("checkpoint", help="a checkpoint-N, or a run folder (its newest one)")
    evaluate.add_argument("--dataset", help="as for training; default: the validation part of the run's corpus")
    evaluate.add_argument("--split", default="validation", help="split of a named corpus or Hub dataset [validation]")
    evaluate.add_argument("--text_column", default="text", help="column that holds the text [text]")
    evaluate.add_argument("--documents", type=_positive, default=500, help="documents scored [500]")
    evaluate.add_argument("--max_seq_length", type=_positive, help="tokens of a document; default: those of the run")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    generate = commands.add_parser("generate", help="let a model write")
    generate.add_argument("checkpoint", help="a checkpoint-N, or a run folder (its newest one)")
    generate.add_argument("--prompt", required=True, help="the text that it continues")
    generate.add_argument("--new_tokens", type=_positive, default=40, help="tokens to write, fewer at end of text [40]")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token [0]")
    generate.add_argument("--seed", type=int, default=0, help="of the draws when the temperature is above 0 [0]")

    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer on a corpus")
    tokenizer.add_argument("--dataset", required=True, help="as for training")
    tokenizer.add_argument("--text_column", default="text", help="column that holds the text [text]")
    tokenizer.add_argument(
        "--kind",
        choices=("sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"),
        default="sentencepiece-bpe",
        help="[sentencepiece-bpe]",
    )
    tokenizer.add_argument("--vocab_size", type=_positive, default=8192, help="tokens of the vocabulary [8192]")
    tokenizer.add_argument("--documents", type=_positive, default=10_000, help="documents read [10000]")
    tokenizer.add_argument("--output", required=True, help="a new folder, for --tokenizer")

    verify = commands.add_parser("verify", help="prove that a run is what its ledger says, or that two are the same")
    verify.add_argument("run", help="a run folder")
    verify.add_argument("other", nargs="?", help="a second run folder: are the two the same run?")
    verify.add_argument(
        "--replay", metavar="A:B", help="train steps A to B-1 again from the nearest checkpoint, compare bit by bit"
    )
    verify.add_argument("--json", action="store_true", help="print JSON")

    commands.add_parser(
        "plan",
        help="memory, time and disk of a run, found by making its first steps",
        usage="python -m slimpajama_hf plan [flags of run_clm_slimpajama.py]",
        description="Makes the first steps of the run that the same flags would start, in a folder thrown away.",
    )

    inspect = commands.add_parser(
        "inspect", help="the passport, the text and the tokens of a step; was this ever read?"
    )
    inspect.add_argument("run", help="a run folder")
    what = inspect.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="N", help="passport, text and tokens of this step")
    what.add_argument("--find", metavar="TEXT", help="whether this was read, when, and with what loss")
    inspect.add_argument("--checkpoint", type=int, metavar="M", help="with --step: how checkpoint-M sees the document")
    inspect.add_argument("--sample", type=int, metavar="K", help="with --step: of several samples this one, from 0 [0]")
    inspect.add_argument("--tokens", type=_positive, metavar="K", help="with --step: tokens in the table [12]")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    push = commands.add_parser("push", help="push the newest checkpoint to the Hub, or finish what was not pushed")
    push.add_argument("run", help="a run folder")
    push.add_argument("--hub_model_id", metavar="OWNER/NAME", help="where to; default: as the run was trained with")
    push.add_argument("--hub_private_repo", action="store_true", default=None, help="make a private repository")
    push.add_argument("--hub_revision", metavar="BRANCH", help="branch; default: as the run, else main")
    push.add_argument("--hub_strategy", choices=("checkpoint", "every_save"), help="with what resuming needs, or not")
    push.add_argument("--hub_license", metavar="LICENCE", help="licence on the card; default: none is stated")
    push.add_argument("--hub_patience", type=float, default=600.0, help="seconds to wait for a Hub which fails [600]")

    report = commands.add_parser("report", help="one HTML file that shows everything about a run")
    report.add_argument("run", help="a run folder")
    report.add_argument(
        "--watch", action="store_true", help="show it in a browser as the run goes on (127.0.0.1 alone)"
    )
    report.add_argument("--animate", action="store_true", help="an animation of the run instead, RUN/training.gif")
    report.add_argument(
        "--port", type=_positive, help="with --watch: the port; default: 8642, or the next that is free"
    )

    compare = commands.add_parser("compare", help="runs side by side: a chart and a table by step, tokens and time")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="two or more run folders")
    compare.add_argument("--output", metavar="FILE.png", help="the chart [comparison.png]")
    compare.add_argument("--json", action="store_true", help="print JSON; draws no chart unless --output is given")

    rewind = commands.add_parser("rewind", help="the run again from a checkpoint, without one document: what it did")
    rewind.add_argument("run", help="a run folder")
    rewind.add_argument(
        "--to", type=int, metavar="N", help="begin at the nearest checkpoint at or before step N [STEP]"
    )
    rewind.add_argument("--drop", type=int, metavar="STEP", help="leave the document of this step out; default: none")
    rewind.add_argument("--steps", type=_positive, metavar="K", help="steps behind it; default: all that the run has")
    rewind.add_argument("--output_dir", metavar="DIR", help="folder of the new run; default: beside the old one")
    rewind.add_argument("--json", action="store_true", help="print JSON")

    views = commands.add_parser("views", help="make metrics, samples and chart again from the ledger")
    views.add_argument("run", help="a run folder")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return number


def _evaluate(options: argparse.Namespace) -> int:
    from slimpajama_hf import evaluation, session

    session.quiet_libraries()
    result = evaluation.of_checkpoint(
        options.checkpoint,
        options.dataset,
        options.documents,
        options.max_seq_length,
        options.text_column,
        options.split,
    )
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return 0
    lines = [
        f"{result['checkpoint']} on {result['corpus']}, first {result['max_seq_length']} tokens of each document",
        f"{'domain':<24}{'documents':>10}{'loss':>9}{'perplexity':>12}{'accuracy':>10}{'bits/byte':>11}",
    ]
    averaged = {
        f"{domain}, averaged": scores for domain, scores in (result["averaged"] or {}).items() if domain == "all"
    }
    for domain, scores in (result["scores"] | averaged).items():
        lines.append(
            f"{domain:<24}{scores['samples']:>10,}{scores['loss']:>9.4f}{scores['perplexity']:>12,.1f}"
            f"{scores['accuracy']:>10.1%}{scores['bits_per_byte']:>11.4f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from slimpajama_hf import checkpoints, session

    folder = checkpoints.resolve(options.checkpoint)
    session.quiet_libraries()
    from slimpajama_hf import generation
    from slimpajama_hf.screen import Waiting

    with Waiting("loading the model"):
        text = generation.from_checkpoint(folder, options.prompt, options.new_tokens, options.temperature, options.seed)
    sys.stdout.write(text + "\n")
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from pathlib import Path

    from slimpajama_hf import corpora, screen
    from slimpajama_hf.corpora import Cursor, Document
    from slimpajama_hf.screen import Waiting
    from slimpajama_hf.tokenizer import train_tokenizer

    output = Path(options.output)
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"--output {output}: there is something in it already; name a new folder")
    with Waiting("opening the corpus") as waiting:
        corpus = corpora.open_corpus(options.dataset, text_column=options.text_column, waiting=waiting)
    records = corpus.records(Cursor())
    texts = (record.text for record in records if isinstance(record, Document))
    train_tokenizer(itertools.islice(texts, options.documents), options.kind, options.vocab_size, output, screen.say)
    screen.say(f"trained on {corpus.name}; use it with --tokenizer {output}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from slimpajama_hf import verify
    from slimpajama_hf.screen import Waiting

    if options.replay is not None:
        if options.other is not None:
            raise UsageError("--replay: of one run; leave the second folder out")
        # No Waiting here: the training that it starts shows its own progress.
        report = verify.replay(options.run, *verify.parse_range(options.replay))
    else:
        with Waiting("reading the ledger and the checkpoints"):
            report = verify.compare(options.run, options.other) if options.other else verify.verify(options.run)
    text = json.dumps(report.data, indent=1) if options.json else "\n".join(report.lines)
    sys.stdout.write(text + "\n")
    return 0 if report.ok else 1


def _inspect(options: argparse.Namespace) -> int:
    from slimpajama_hf import inspection

    return inspection.main(options)


def _push(options: argparse.Namespace) -> int:
    from slimpajama_hf.hub import push

    return push.main(options)


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from slimpajama_hf import screen
    from slimpajama_hf.report import watch, write

    if options.port is not None and not options.watch:
        raise UsageError("--port: it belongs to --watch; add that, or leave it out")
    if options.animate and options.watch:
        raise UsageError("--animate and --watch: one or the other")
    folder = Path(options.run).expanduser()
    if options.watch:
        return watch.serve(folder, options.port, screen.say)
    if options.animate:
        from slimpajama_hf import animation

        with screen.Waiting("drawing"):
            path = animation.write(folder)
        sys.stdout.write(f"{path}\n")
        return 0
    sys.stdout.write(f"{write(folder)}\n")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from slimpajama_hf import comparison

    return comparison.main(options)


def _rewind(options: argparse.Namespace) -> int:
    from slimpajama_hf import rewind

    return rewind.main(options)


def _views(options: argparse.Namespace) -> int:
    from slimpajama_hf import views

    return views.main(options.run)


def main(argv: list[str]) -> int:
    if argv[:1] == ["plan"]:
        # Its flags are those of training, which that parser knows.
        from slimpajama_hf import trial

        return trial.main(argv[1:])
    options = _parser().parse_args(argv)
    commands = {
        "compare": _compare,
        "evaluate": _evaluate,
        "generate": _generate,
        "inspect": _inspect,
        "rewind": _rewind,
        "tokenizer": _tokenizer,
        "verify": _verify,
        "push": _push,
        "report": _report,
        "views": _views,
    }
    return commands[options.command](options)


if __name__ == "__main__":
    # `--help` of a command is argparse's own; cli.run would print the training page.
    if any(flag in sys.argv[1:] for flag in ("-h", "--help")):
        _parser().parse_args(sys.argv[1:])
    raise SystemExit(cli.run(main, if_stopped="stopped"))
