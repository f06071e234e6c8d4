"""What a step costs with N processes, computed: gradients against links, documents against their readers.

    python benchmarks/scaling.py --parameters 124e6 --step_ms 2.5

DDP sends the gradients (float32, 4 bytes a parameter) while the backward is still on; a step is as long as the slower
of the two. An all-reduce moves 2 (n - 1) / n times its bytes through each member's link: inside a machine over its
GPUs' own links, between machines over one network card a GPU, each with its share of the gradients (NCCL's rings over
all cards), plus a latency for each hop of a tree of machines. Every process also reads and cuts into tokens the
documents of all N (`samples.SampleStream`), which must keep up with the steps.
"""

from __future__ import annotations

import argparse
import math


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
    parser.add_argument("--documents_s", type=float, required=True, help="documents a second that one process reads")
    parser.add_argument("--accumulated", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
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
