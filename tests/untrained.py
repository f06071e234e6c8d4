"""A run folder without a model: real documents, read and cut into samples as training does, in a real ledger.

What only reads documents again is tried on hundreds of them this way, and costs no training.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from slimpajama_hf.corpus import opening
from slimpajama_hf.lookback import reread
from slimpajama_hf.record.ledger import Ledger, Row
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.samples.stream import SampleStream


def make_run(
    path: Path,
    dataset: str,
    encoder: Any,
    mode: str = "truncate",
    length: int = 64,
    steps: int | None = None,
    **more: Any,
) -> RunFolder:
    """A run folder of `steps` samples (None: all) of `dataset`; `more` goes to the stream."""
    corpus = opening.open_corpus(dataset)
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    folder.record.write_text(
        json.dumps(
            {
                "run_id": "untrained",
                "corpus": corpus.describe(),
                "tokenizer": "builtin",
                "tokenizer_sha256": reread.vocabulary_sha256(encoder.tokenizer),
                "model": {"name": "none", "sample_mode": mode, "max_seq_length": length},
            }
        )
    )
    folder.config.write_text(json.dumps({"shuffle_buffer": more.get("shuffle_buffer", 0)}))
    folder.ledger.unlink(missing_ok=True)
    file = Ledger(folder.ledger)
    for step, sample in enumerate(itertools.islice(SampleStream(corpus, encoder, mode, length, **more), steps)):
        document = sample.document
        file.append(
            Row(
                step=step, loss=8.0 - step / 1000, accuracy=0.25, tokens=len(sample.input_ids), throughput=1000.0,
                text_bytes=sample.text_bytes, learning_rate=1e-3, grad_norm=1.0, mirror=document.mirror,
                shard=document.shard, row=document.row, text_sha1=document.sha1, domain=document.domain,
                tokens_cut=sample.tokens_cut, tokens_cut_exact=sample.tokens_cut_exact, code_bits=1.0, step_seconds=0.01,
                part=sample.part, skipped=sample.skipped, documents=sample.documents,
            )
        )  # fmt: skip
    file.close()
    return folder
