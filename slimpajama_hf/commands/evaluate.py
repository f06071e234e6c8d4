"""`evaluate`: score a saved checkpoint on held-out documents."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from typing import Any

from slimpajama_hf import bars
from slimpajama_hf.errors import UserError
from slimpajama_hf.settings.arguments import TXT_DOCUMENTS, positive

HELP = "held-out loss, perplexity, accuracy, bits per byte, by domain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate`."""
    parser.add_argument("checkpoint", help="a checkpoint-N, or a run folder (its newest one)")
    parser.add_argument("--dataset", help="as for training; default: the validation part of the run's corpus")
    parser.add_argument("--split", default="validation", help="split of a named corpus or Hub dataset [validation]")
    parser.add_argument("--text_column", default="text", help="column that holds the text [text]")
    parser.add_argument(
        "--txt_documents", default="line", choices=TXT_DOCUMENTS, help="what one document of a .txt file is [line]"
    )
    parser.add_argument("--documents", type=positive, default=500, help="documents scored [500]")
    parser.add_argument("--max_seq_length", type=positive, help="tokens of a document; default: those of the run")
    parser.add_argument(
        "--whole", action="store_true", help="bits per byte of whole documents too, in overlapping windows"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    from slimpajama_hf import screen

    screen.quiet_libraries()
    result = of_checkpoint(
        options.checkpoint,
        options.dataset,
        options.documents,
        options.max_seq_length,
        options.text_column,
        options.split,
        options.txt_documents,
        options.whole,
    )
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return 0
    length = result["max_seq_length"]
    whole = f"; whole: bits per byte of all of it, in windows of {length} that overlap by half" if options.whole else ""
    lines = [
        f"{result['checkpoint']} on {result['corpus']}, first {length} tokens of each document{whole}",
        f"{'domain':<23}{'documents':>10}{'bits/byte':>10}"
        + f"{'whole':>8}" * options.whole
        + f"{'loss':>8}{'perplexity':>12}{'accuracy':>9}",
    ]
    averaged = {
        f"{domain}, averaged": scores for domain, scores in (result["averaged"] or {}).items() if domain == "all"
    }
    for domain, scores in (result["scores"] | averaged).items():
        lines.append(
            f"{domain:<23}{scores['samples']:>10,}{_shown(scores['bits_per_byte'], '.4f'):>10}"
            + (f"{_shown(scores['whole_bits_per_byte'], '.4f'):>8}" if options.whole else "")
            + f"{_shown(scores['loss'], '.4f'):>8}{_shown(scores['perplexity'], ',.1f'):>12}{scores['accuracy']:>9.1%}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _shown(value: float | None, form: str) -> str:
    return "nan/inf" if value is None else format(value, form)


def of_checkpoint(
    place: str,
    dataset: str | None,
    documents: int,
    max_length: int | None,
    text_column: str,
    split: str,
    txt_documents: str = "line",
    whole: bool = False,
) -> dict[str, Any]:
    """Score a saved checkpoint, or the newest one of a run, on held-out documents."""
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM

    from slimpajama_hf.corpus import opening, unchanged
    from slimpajama_hf.corpus.opening import validation_of
    from slimpajama_hf.model import averaging
    from slimpajama_hf.model.presets import vocabulary as size_of_vocabulary
    from slimpajama_hf.record import checkpoints
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.samples.tokenizer import load_tokenizer
    from slimpajama_hf.screen import Waiting
    from slimpajama_hf.training.evaluation import next_token_accuracy, score

    folder = checkpoints.resolve(place)
    with Waiting("opening the corpus") as waiting:
        # Averaged weights are in a folder of their checkpoint.
        run = RunFolder(folder.parent.parent if folder.name == averaging.FOLDER else folder.parent)
        record = run.read_record() if run.record.is_file() else None
        if dataset is not None:
            corpus = opening.open_corpus(
                dataset, text_column=text_column, split=split, txt_documents=txt_documents, waiting=waiting
            )
        elif record is not None:
            corpus = validation_of(unchanged.recorded(record["corpus"]), "--dataset")
        else:
            raise UserError(f"{place}: not in a run folder, so its corpus is not known; name documents with --dataset")
        waiting("loading the model")
        length = max_length or (record["model"]["max_seq_length"] if record else 256)
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=False)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        encoder = Encoder(load_tokenizer(str(folder)))
        has_average = (folder / averaging.FOLDER / "config.json").is_file()
        average: Any = None
        if has_average:
            average = AutoModelForCausalLM.from_pretrained(str(folder / averaging.FOLDER), trust_remote_code=False)
            average.to(model.device)
        waiting("loading `evaluate`")
        metric = next_token_accuracy()
        waiting("reading the documents")
        start = time.perf_counter()
        stream = SampleStream(corpus, encoder, "truncate", length, read_ahead=0)
        samples = list(itertools.islice(stream, documents))
    vocabulary, averaged = size_of_vocabulary(encoder.tokenizer), None
    with bars.Counting("Scoring", len(samples) * (1 + has_average)) as counting:
        windows = (encoder, length) if whole else None
        scores = score(model, samples, vocabulary, counting, windows)
        if has_average:
            averaged = score(average, samples, vocabulary, lambda done: counting(len(samples) + done), windows)
    if not scores["all"].samples:
        raise UserError(f"{corpus.name}: no document in it that can be scored{stream.why_nothing()}")
    return {
        "checkpoint": str(Path(folder)),
        "corpus": corpus.mirror,
        "shards": [shard.name for shard in itertools.islice(corpus.files, 20)],
        "max_seq_length": length,
        "seconds": round(time.perf_counter() - start, 3),
        "scores": {domain: each.to_dict(metric) for domain, each in scores.items()},
        "averaged": averaged and {domain: each.to_dict(metric) for domain, each in averaged.items()},
    }
