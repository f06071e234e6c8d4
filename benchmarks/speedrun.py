"""A race that a laptop can enter: seconds and documents to a fixed score on the embedded corpus.

    make speedrun                                             # ours, ten seeds, one after the other, and the table
    python benchmarks/speedrun.py --entries ours --seeds 1 2 3
    python benchmarks/speedrun.py --name mine --flags='--hidden_rate 0.3'     # an entry of your own: flags of ours
    python benchmarks/speedrun.py --table                     # what is there already, without running anything

The score is `TARGET` bits per byte over all bytes of `HELD_OUT` documents that no step learns, by the averaged weights
where an entry has any. It is taken every `DOCUMENTS_BETWEEN` documents with the clock stopped; between two scores that
lie on both sides of the target the way is a line. A run ends there, or after `DOCUMENTS`. Rules and table:
docs/speedrun.md. Results: benchmarks/results/speedrun.jsonl, a line a run; what is there is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import comparison
import learning
from comparison import Arm

RESULTS = learning.RESULTS.parent / "speedrun.jsonl"

#: Bits per byte.
TARGET = 2.0
DOCUMENTS, DOCUMENTS_BETWEEN, WARMUP = 8_000, 250, 300
HELD_OUT = 200
SEEDS = tuple(range(1, 11))

#: The entry that the others have to beat is the first.
ENTRIES: dict[str, Arm] = {
    "ours": Arm("ours"),
    "ours, corpus:8192": Arm("ours", flags=("--tokenizer", "corpus:8192", "--init_embeddings", "random")),
    "ours, corpus:8192, embeddings counted": Arm("ours", flags=("--tokenizer", "corpus:8192")),
    "stock Trainer, one document a step, 3e-4": Arm("stock", rate=3e-4),
    "stock Trainer, one document a step, 1e-3": Arm("stock"),
    "packed batches of 8, 5e-4": Arm("stock", 8, 5e-4),
    "AdamW loop, one document a step, 3e-4": Arm("loop", rate=3e-4),
}


class Race(comparison.Clock):
    """Scores every so many documents, and stops at the target."""

    def __init__(self, documents_a_step: float, options: argparse.Namespace, tokens: Iterator[int]) -> None:
        super().__init__(options, tokens)
        self._documents_a_step = documents_a_step
        self._steps, self._scored = 0, 0
        self._texts = held_out()

    def is_due(self, seconds: float) -> bool:
        self._steps += 1
        made = self._steps * self._documents_a_step // DOCUMENTS_BETWEEN
        due, self._scored = made > self._scored, int(made)
        return due

    def is_enough(self) -> bool:
        return self.marks[-1]["bits_per_byte"] <= TARGET

    def score(self, network: Any) -> dict[str, Any]:
        from slimpajama_hf.model.presets import vocabulary
        from slimpajama_hf.samples.encoder import Encoder
        from slimpajama_hf.training.evaluation import nats_behind

        encoder = Encoder(self.tokenizer)
        nats = len(self._texts) * math.log(vocabulary(self.tokenizer))
        network.eval()
        with self.averaged():
            for text in self._texts:
                nats += nats_behind(network, encoder.encode(text)[0], 1, comparison.MAX_LENGTH)
        network.train()
        bits = nats / math.log(2) / sum(len(text.encode()) for text in self._texts)
        return {"documents": round(self._steps * self._documents_a_step), "bits_per_byte": round(bits, 5)}


def held_out() -> list[str]:
    """The texts that are scored."""
    from slimpajama_hf.corpus import documents, opening

    records = opening.open_corpus("embedded", split="validation").records(documents.Cursor())
    texts = (each.text for each in records if isinstance(each, documents.Document))
    return list(itertools.islice(texts, HELD_OUT))


def corpus_hash() -> str:
    """Of what is scored: another Python has another standard library, and with it another corpus."""
    return hashlib.sha256("\0".join(held_out()).encode()).hexdigest()[:12]


def one_run(options: argparse.Namespace, entry: str, seed: int) -> dict[str, Any]:
    options.dataset, options.documents, options.warmup_share = "embedded", DOCUMENTS, WARMUP / DOCUMENTS
    arm = ENTRIES[entry] if options.flags is None else Arm("ours", flags=tuple(options.flags.split()))
    a_step = 1.0
    if arm.windows > 1:
        a_step = arm.windows * comparison.MAX_LENGTH * DOCUMENTS / sum(comparison.lengths(options))
    race = comparison.HOW[arm.how](options, arm, seed, partial(Race, a_step))
    return {"corpus": corpus_hash(), "entry": dataclasses.asdict(arm), "marks": race.marks}


def reached(marks: list[dict[str, Any]], what: str) -> float | None:
    """`seconds` or `documents` at which the target was reached; None where it was not."""
    for before, after in itertools.pairwise([{"seconds": 0.0, "documents": 0, "bits_per_byte": 99.0}, *marks]):
        if after["bits_per_byte"] <= TARGET:
            share = (before["bits_per_byte"] - TARGET) / (before["bits_per_byte"] - after["bits_per_byte"])
            return before[what] + share * (after[what] - before[what])
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each entry: documents and seconds to the target, mean and standard error over seeds; from three seeds
    on how probable so much shorter times than the first entry's would be by chance (Mann-Whitney, one-sided)."""
    from scipy.stats import mannwhitneyu

    lines = [
        "| entry | seeds | reached | documents | seconds | p against the first | processor, commit |",
        "|---|---|---|---|---|---|---|",
    ]
    first: list[float] = []
    for entry in dict.fromkeys(row["arm"] for row in rows):
        of_entry = [row for row in rows if row["arm"] == entry]
        seconds = [found for row in of_entry if (found := reached(row["marks"], "seconds")) is not None]
        documents = [found for row in of_entry if (found := reached(row["marks"], "documents")) is not None]
        machines = ", ".join(dict.fromkeys(f"{row['machine']['processor']}, {row['commit']}" for row in of_entry))
        if seconds:
            p = f"{mannwhitneyu(seconds, first, alternative='less').pvalue:.5f}" if first and len(seconds) > 2 else ""
            cells = [mean_and_error(documents, 0), mean_and_error(seconds, 1), p]
            first = first or seconds
        else:
            last = statistics.mean(row["marks"][-1]["bits_per_byte"] for row in of_entry)
            marks = of_entry[0]["marks"][-1]
            cells = [f"{last:.3f} after {marks['documents']:,}", f"({marks['seconds']:,.0f})", ""]
        lines.append(f"| {entry} | {len(of_entry)} | {len(seconds)} | {' | '.join(cells)} | {machines} |")
    return "\n".join(lines)


def mean_and_error(values: list[float], digits: int) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{error}"


def done(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What was run to this target on the corpus that this Python has, in this precision and as many at once."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    facts = facts_of(options) | {"corpus": corpus_hash()}
    return [row for row in map(json.loads, lines) if facts.items() <= row.items()]


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    return {"precision": options.precision, "jobs": options.jobs, "model": "tiny", "target": TARGET}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", "--arms", nargs="+", default=["ours"], metavar="ENTRY", help=", ".join(ENTRIES))
    parser.add_argument("--name", help="of an entry of your own")
    parser.add_argument("--flags", help="its flags, of the program")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; seconds compare at 1 alone [1]")
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if (options.name is None) != (options.flags is None):
        parser.error("--name and --flags go together: what the table calls your entry, and what it is")
    unknown = [entry for entry in options.entries if entry not in ENTRIES and entry != options.name]
    if unknown:
        parser.error(f"--entries {unknown[0]}: there are {', '.join(map(repr, ENTRIES))}")
    if options.one:
        print(json.dumps(one_run(options, options.entries[0], options.seeds[0])))
        return
    if not options.table:
        entries = options.entries if options.name is None else [options.name]
        there = {(row["arm"], row["seed"]) for row in done(options)}
        missing = [(entry, seed) for entry in entries for seed in options.seeds if (entry, seed) not in there]
        words = [__file__, "--one", "--precision", options.precision]
        if options.name is not None:
            words += [f"--name={options.name}", f"--flags={options.flags}"]
        learning.run_all(missing, words, dict.fromkeys(entries, facts_of(options)), RESULTS, options)
    print(table(done(options)))


if __name__ == "__main__":
    main()
