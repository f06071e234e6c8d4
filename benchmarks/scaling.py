"""Many processes: their readers simulated, and what a step costs with N of them computed.

    python benchmarks/scaling.py --simulate 'train/*.jsonl.zst'
    python benchmarks/scaling.py --documents_s 22000 --parameters 124e6 --step_ms 2.5

The simulation opens the real reader of each rank of 64 processes, then of 48 from where they stopped, then of 100, then
of some of 1,024, over the corpus again and again. What they learn together is compared with what one process reads. The
table goes into a JSON file under benchmarks/results/.

The other table is computed: gradients against links, documents against their readers.
DDP sends the gradients (float32, 4 bytes a parameter) while the backward is still on; a step is as long as the slower
of the two. An all-reduce moves 2 (n - 1) / n times its bytes through each member's link: inside a machine over its
GPUs' own links, between machines over one network card a GPU, each with its share of the gradients (NCCL's rings over
all cards), plus a latency for each hop of a tree of machines. Every process also reads the documents of all N
(`samples.SampleStream`), which must keep up with the steps.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Processes, steps, and which of them are simulated (None: all).
PHASES: Sequence[tuple[int, int, Sequence[int] | None]] = (
    (64, 20, None),
    (48, 20, None),
    (100, 20, None),
    (1024, 10, (0, 1, 2, 255, 511, 512, 767, 1022, 1023)),
)


def simulate(
    dataset: str, phases: Sequence[tuple[int, int, Sequence[int] | None]] = PHASES, max_length: int = 256
) -> list[dict[str, Any]]:
    """One line for each phase; each goes on where the one before stopped. Raises AssertionError where the documents of
    all ranks are not those of one process, each in its place."""
    from slimpajama_hf.corpus import opening
    from slimpajama_hf.corpus.documents import Cursor
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    corpus, encoder = opening.open_corpus(dataset), Encoder(load_tokenizer("builtin"))

    def stream(world_size: int, rank: int, start: Cursor) -> SampleStream:
        more: dict[str, Any] = {"epochs": 1_000_000, "read_ahead": 0, "start": start}
        return SampleStream(corpus, encoder, "truncate", max_length, world_size, rank, **more)

    alone = iter(stream(1, 0, Cursor()))
    start, lines = Cursor(), []
    for world_size, steps, sampled in phases:
        expected = [_hash_of(sample) for sample in itertools.islice(alone, world_size * steps)]
        assert len(set(expected)) == len(expected), "one process reads a document twice"
        ranks = range(world_size) if sampled is None else sampled
        found: dict[int, str] = {}
        bytes_read, seconds, ends = [], [], set()
        for rank in ranks:
            before, began = _bytes_read(), time.process_time()
            own = list(itertools.islice(stream(world_size, rank, start), steps))
            seconds.append(time.process_time() - began)
            bytes_read.append(_bytes_read() - before)
            ends.add(own[-1].after)
            for step, sample in enumerate(own):
                assert not sample.only_fills
                found[step * world_size + rank] = _hash_of(sample)
        assert all(expected[place] == sha256 for place, sha256 in found.items()), "not the documents of one process"
        assert len(set(found.values())) == len(found) == len(ranks) * steps, "a document was learned twice"
        (start,) = ends
        median = sorted(seconds)[len(seconds) // 2]
        lines.append(
            {
                "processes": world_size,
                "simulated": len(ranks),
                "steps": steps,
                "documents": world_size * steps,
                "learned_by_the_simulated": len(found),
                "sha256_of_all": hashlib.sha256("".join(map(found.__getitem__, sorted(found))).encode()).hexdigest(),
                "documents_s_of_a_process": round(world_size * steps / median),
                "documents_s_of_the_first": round(world_size * steps / seconds[0]),
                "own_documents_tokenized": steps,
                "mb_read_by_a_process": round(sum(bytes_read) / len(bytes_read) / 1e6, 2),
                "mb_read_by_a_node_of_8": round(8 * sum(bytes_read) / len(bytes_read) / 1e6, 2),
            }
        )
    return lines


def hand_on(dataset: str, mode: str, processes: int = 4, steps: int = 500) -> dict[str, Any]:
    """`window` or `pack` by real processes of one machine: processor time of the first and of the others."""
    from slimpajama_hf.samples.handed_on import Machine

    first = Machine(range(processes))
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes - 1) as pool:
        asked = [(dataset, mode, processes, rank, steps, first.place) for rank in range(1, processes)]
        others = pool.starmap_async(_seconds_of, asked, chunksize=1)
        own = _seconds_of(dataset, mode, processes, 0, steps, first)
        spent = others.get()
    samples = processes * steps
    return {
        "mode": mode,
        "processes": processes,
        "samples": samples,
        "samples_s_of_the_first": round(samples / own),
        "samples_s_of_another": round(samples / (sum(spent) / len(spent))),
    }


def _seconds_of(dataset: str, mode: str, processes: int, rank: int, steps: int, machine: Any) -> float:
    """Processor seconds of one of them, the opening of the corpus left out. `machine`: of the first, or its place."""
    from slimpajama_hf.corpus import opening
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.handed_on import Machine
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    if rank:
        machine = Machine(range(processes), machine)
    corpus, encoder = opening.open_corpus(dataset), Encoder(load_tokenizer("builtin"))
    stream = SampleStream(corpus, encoder, mode, 256, processes, rank, epochs=1_000_000, read_ahead=0, machine=machine)
    began = time.process_time()
    taken = len(list(itertools.islice(stream, steps)))
    assert taken == steps
    return time.process_time() - began


def _hash_of(sample: Any) -> str:
    """Of a document in its pass, and its tokens."""
    document = sample.document
    place = f"{document.here.epoch} {document.shard} {document.row} {document.sha1} {sample.input_ids}"
    return hashlib.sha256(place.encode()).hexdigest()


def _bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


def show_simulation(dataset: str) -> None:
    """Simulate, print the table, and keep it."""
    from benchmarks.steps import commit, machine

    lines = simulate(dataset)
    where = machine()
    print(f"{where['processor']}, commit {commit()}, load {os.getloadavg()[0]:.1f}")
    head = {
        "processes": "processes", "simulated": "simulated", "documents": "documents read by each",
        "documents_s_of_a_process": "documents/s of a process", "documents_s_of_the_first": "of the first",
        "mb_read_by_a_process": "MB read by a process", "mb_read_by_a_node_of_8": "by a node of 8",
    }  # fmt: skip
    print("| " + " | ".join(head.values()) + " |\n" + "|" + "---|" * len(head))
    for line in lines:
        print("| " + " | ".join(f"{line[name]:,}" for name in head) + " |")
    handed_on = [hand_on(dataset, mode) for mode in ("window", "pack")]
    for line in handed_on:
        print(line)
    name = f"ranks-{time.strftime('%Y-%m-%d')}-{commit().rstrip('+')}.json"
    result = {
        "machine": where,
        "commit": commit(),
        "load": os.getloadavg(),
        "dataset": Path(dataset).name,
        "phases": lines,
        "handed_on": handed_on,
    }
    path = ROOT / "benchmarks" / "results" / name
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.relative_to(ROOT))


def communication_ms(parameters: float, processes: int, options: argparse.Namespace) -> float:
    """Milliseconds of one all-reduce of the gradients over `processes` GPUs."""
    size = 4 * parameters
    inside = min(processes, options.gpus_a_machine)
    machines = math.ceil(processes / options.gpus_a_machine)
    seconds = 2 * (inside - 1) / inside * size / (1e9 * options.inside_gb)
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * size / inside / (1e9 * options.between_gb)
        seconds += 2 * math.ceil(math.log2(machines)) * options.hop_us / 1e6
    return 1e3 * seconds


def step_ms(processes: int, accumulated: int, options: argparse.Namespace) -> tuple[float, str]:
    """Milliseconds of a step in which each process learns `accumulated` documents, and what it waits for."""
    compute = options.update_ms + accumulated * (options.step_ms - options.update_ms)
    # Two thirds of forward and backward are the backward; of the last document it hides the gradients' way.
    hidden = 2 / 3 * (options.step_ms - options.update_ms)
    exposed = max(0.0, communication_ms(options.parameters, processes, options) - hidden) if processes > 1 else 0.0
    reading = 1e3 * processes * accumulated / options.documents_s
    if reading > compute + exposed:
        return reading, "reading"
    return compute + exposed, "gradients" if exposed > 0.1 * compute else "arithmetic"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=124e6)
    parser.add_argument("--step_ms", type=float, default=2.5, help="a step of one process [2.5]")
    parser.add_argument("--update_ms", type=float, default=0.8, help="of which AdamW, once a step [0.8]")
    parser.add_argument("--gpus_a_machine", type=int, default=8)
    parser.add_argument("--inside_gb", type=float, default=450, help="GB/s of its links in a machine, each way [450]")
    parser.add_argument("--between_gb", type=float, default=50, help="GB/s of its network card, each way [50]")
    parser.add_argument("--hop_us", type=float, default=5, help="latency of a hop between machines [5]")
    parser.add_argument("--documents_s", type=float, help="documents a second that one process reads")
    parser.add_argument("--accumulated", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--simulate", metavar="DATASET", help="simulate the readers of this corpus instead")
    options = parser.parse_args()
    if options.simulate:
        show_simulation(options.simulate)
        return
    if options.documents_s is None:
        parser.error("--documents_s is missing: documents a second that one process reads (or --simulate DATASET)")
    head = ["GPUs", "gradients, ms"]
    for accumulated in options.accumulated:
        head += [f"step of {accumulated} each, ms", "tokens/s", "efficiency", "waits for"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for processes in (1, 2, 4, 8, 16, 64, 256, 1024):
        gradients = communication_ms(options.parameters, processes, options)
        cells = [str(processes), f"{gradients:.2f}" if processes > 1 else ""]
        for accumulated in options.accumulated:
            taken, why = step_ms(processes, accumulated, options)
            alone, _ = step_ms(1, accumulated, options)
            rate = 1e3 * 256 * processes * accumulated / taken
            cells += [f"{taken:.2f}", f"{rate:,.0f}", f"{alone / taken:.0%}", why]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
