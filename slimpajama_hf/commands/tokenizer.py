"""`tokenizer`: train a tokenizer on a corpus."""

from __future__ import annotations

import argparse
import itertools

from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings.arguments import TXT_DOCUMENTS, positive

HELP = "train a tokenizer on a corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `tokenizer`."""
    parser.add_argument("--dataset", required=True, help="as for training")
    parser.add_argument(
        "--txt_documents", default="line", choices=TXT_DOCUMENTS, help="what one document of a .txt file is [line]"
    )
    parser.add_argument("--text_column", default="text", help="column that holds the text [text]")
    parser.add_argument(
        "--kind",
        choices=("sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"),
        default="sentencepiece-bpe",
        help="[sentencepiece-bpe]",
    )
    parser.add_argument("--vocab_size", type=positive, default=8192, help="tokens of the vocabulary [8192]")
    parser.add_argument("--documents", type=positive, default=10_000, help="documents read [10000]")
    parser.add_argument("--output", required=True, help="a new folder, for --tokenizer")


def main(options: argparse.Namespace) -> int:
    from pathlib import Path

    from slimpajama_hf import screen
    from slimpajama_hf.corpus import opening
    from slimpajama_hf.corpus.documents import Cursor, Document
    from slimpajama_hf.samples.tokenizer_training import train_tokenizer
    from slimpajama_hf.screen import Waiting

    output = Path(options.output)
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"--output {output}: there is something in it already; name a new folder")
    with Waiting("opening the corpus") as waiting:
        corpus = opening.open_corpus(
            options.dataset, text_column=options.text_column, txt_documents=options.txt_documents, waiting=waiting
        )
    records = corpus.records(Cursor())
    texts = (record.text for record in records if isinstance(record, Document))
    train_tokenizer(itertools.islice(texts, options.documents), options.kind, options.vocab_size, output, screen.say)
    screen.say(f"trained on {corpus.name}; use it with --tokenizer {output}")
    return 0
