"""`python -m tests.clients ENVIRONMENTS`: trains two small runs, asks every client, prints the table of docs/clients.md.

Exit code 1 where a cell does not hold.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.record import ledger
from tests.clients.environments import python_of
from tests.conftest import ROOT, environment, read_ledger
from tests.hub.loopback_model_hub import LoopbackModelHub

TEXTS = [
    "def main(naïve):\n    return  two",
    "The river and the city",
    "  leading and   inner  spaces",
    "\tx = {'a': 1234567}\n\n# déjà vu, 日本 🎉",
    "import os",
]
NEW_TOKENS = 8
KINDS = {"sp": "SentencePiece", "bpe": "byte-level BPE"}
PLACES = ("root on the Hub", "checkpoint", "averaged")

#: Client script (and what tells two uses of it apart) -> its environment.
OF_MODELS = {
    "in_transformers.py transformers4": "transformers4",
    "in_transformers.py transformers5": "transformers5",
    "in_llama.py": "gguf",
    "in_onnx.py": "onnx",
    "in_lm_eval.py": "harness",
    "in_peft.py": "harness",
}


def run(*words: str | Path, **variables: str) -> str:
    """A command's standard output. Raises RuntimeError with the end of what it said where it fails."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, cwd=ROOT, env=environment(**variables)
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stderr[-3000:]}")
    return done.stdout


def train(output: Path, tokenizer: str, *flags: str, python: str | Path = sys.executable, **variables: str) -> None:
    run(
        python, "run_clm_slimpajama.py", "--dataset", "embedded", "--model", "tiny", "--tokenizer", tokenizer,
        "--config_overrides", "n_layer=2,n_embd=64,n_head=2,n_positions=64", "--max_seq_length", "64",
        "--max_steps", "60", "--save_steps", "30", "--precision", "float32", "--learning_rate", "1e-2",
        "--warmup_steps", "10", "--output_dir", output, *flags, **variables,
    )  # fmt: skip


def write_expected(model: Path, tokenizer: str, target: Path) -> None:
    """What is right for a model: by the tokenizer that it was trained with, from where training had it."""
    import torch
    from transformers import AutoModelForCausalLM

    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(tokenizer))
    net: Any = AutoModelForCausalLM.from_pretrained(str(model)).eval()
    about: dict[str, Any] = {"texts": TEXTS, "new_tokens": NEW_TOKENS, "ids": [], "greedy": [], "greedy_ids": []}
    arrays, nats, predicted = {}, 0.0, 0
    with torch.no_grad():
        for number, text in enumerate(TEXTS):
            ids = encoder.encode(text)[0]
            arrays[f"logits-{number}"] = net(torch.tensor([ids])).logits[0].numpy()
            whole = torch.tensor([[*ids, encoder.tokenizer.eos_token_id]])
            nats += net(whole, labels=whole).loss.item() * len(ids)
            predicted += len(ids)
            # Greedy decoding in plain words: no generate() of any version.
            written = list(ids)
            for _ in range(NEW_TOKENS):
                written.append(int(net(torch.tensor([written])).logits[0, -1].argmax()))
            about["ids"].append(ids)
            about["greedy_ids"].append(written[len(ids) :])
            about["greedy"].append(encoder.decode(written)[len(text) :])
    about["loss_with_eos"] = nats / predicted
    np.savez(f"{target}.npz", **arrays)  # type: ignore[arg-type]
    Path(f"{target}.json").write_text(json.dumps(about))


def ask(script: str, python: Path, request: dict[str, Any], work: Path, **variables: str) -> dict[str, Any]:
    """The answer of a client; one that ends with an error has none of its cells right."""
    path = work / "request.json"
    path.write_text(json.dumps(request))
    try:
        with tempfile.TemporaryDirectory(dir=work) as home:
            said = run(python, ROOT / "tests" / "clients" / script, path, HF_HOME=home, PYTHONPATH="", **variables)
        return dict(json.loads(said.splitlines()[-1]))
    except (RuntimeError, ValueError, IndexError) as error:
        sys.stderr.write(f"{error}\n")
        return {"versions": {script: "failed"}, "cells": {}, "error": str(error).strip().splitlines()[-1][:300]}


def long_run(source: Path, target: Path) -> dict[str, Any]:
    """A run folder of 20,000 steps, in which what is null at first comes after 18,000; what is right of it."""
    target.mkdir()
    shutil.copyfile(source / "run.json", target / "run.json")
    rows, right = read_ledger(source), {"rows": 20_000, "spikes": 2, "late": 7.0, "nested": [3, 4], "loss": 0.0}
    with open(target / "ledger.jsonl", "w", encoding="utf-8") as file:
        for step in range(20_000):
            row = rows[step % len(rows)] | {"step": step, "spike": None, "skipped": {}}
            if step in (18_000, 19_000):
                row |= {"spike": 6.5, "skipped": {"no text": 3 + step // 19_000}, "my_number": 7.0}
            right["loss"] += row["loss"]
            file.write(ledger.encode(row) + "\n")
    return right


class Table:
    """Cells of clients; what does not hold is a note below."""

    def __init__(self, *columns: str) -> None:
        self._lines = [["client", "compared", *columns]]
        self.notes: list[str] = []

    def add(self, client: str, cells: list[dict[str, str] | str]) -> None:
        """`cells`: by column, what is wrong with each check ("" where it holds), or why there is no answer."""
        shown = []
        for cell in cells:
            wrong = [cell] if isinstance(cell, str) else [f"{name}: {why}" for name, why in cell.items() if why]
            if wrong:
                self.notes.append(f"{client}: {'; '.join(wrong)}")
            shown.append(f"no ({len(self.notes)})" if wrong else "yes")
        compared = next((", ".join(cell) for cell in cells if isinstance(cell, dict)), "")
        self._lines.append([client, compared, *shown])

    def __str__(self) -> str:
        lines = ["| " + " | ".join(line) + " |" for line in self._lines]
        lines.insert(1, "|" + "---|" * len(self._lines[0]))
        return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(self.notes, 1))]).rstrip()


def main(environments: Path, work: Path) -> int:
    run(sys.executable, "-m", "slimpajama_hf", "tokenizer", "--dataset", "embedded", "--kind", "byte-bpe",
        "--vocab_size", "2000", "--documents", "400", "--output", work / "bpe-tokenizer")  # fmt: skip
    tokenizers = {"sp": "builtin", "bpe": str(work / "bpe-tokenizer")}
    models = Table(*(f"{KINDS[kind]}: {place}" for kind in KINDS for place in PLACES))
    others = Table("equal")
    hf = python_of(environments, "hf")
    with LoopbackModelHub() as hub:
        places: dict[str, dict[str, Any]] = {}
        for kind, tokenizer in tokenizers.items():
            train(work / kind, tokenizer, "--push_to_hub", "--hub_model_id", f"me/{kind}", **hub.environment())
            last, clone = work / kind / "checkpoint-60", work / f"{kind}-clone"
            wrong = fetch(hf, hub, f"me/{kind}", clone)
            others.add(
                f"`hf` {run(hf, '-c', 'import huggingface_hub as h; print(h.__version__)').strip()}",
                [{f"every byte of me/{kind}": wrong}],
            )
            for place, folder, name in (
                (PLACES[0], clone, f"me/{kind}"),
                (PLACES[1], last, str(last)),
                (PLACES[2], last / "averaged", str(last / "averaged")),
            ):
                key = f"{KINDS[kind]}: {place}"
                right = work / f"expected-{len(places)}"
                # What lies at the root is the checkpoint's.
                write_expected(last if place == PLACES[0] else folder, tokenizer, right)
                gguf = work / f"{len(places)}.gguf"
                run(sys.executable, "-m", "slimpajama_hf", "export", folder, "--to", "gguf", "--output", gguf)
                places[key] = {"model": name, "expected": str(right), "gguf": str(gguf)}
        for words, name in OF_MODELS.items():
            script = words.split()[0]
            entries = {
                key: entry | ({"model": entry["gguf"]} if script == "in_llama.py" else {})
                for key, entry in places.items()
            }
            sys.stderr.write(f"{words}\n")
            answer = ask(script, python_of(environments, name), {"models": entries}, work, **hub.environment(None))
            client = ", ".join(f"{package} {number}" for package, number in answer["versions"].items())
            missing = answer.get("error", "it did not answer")
            models.add(client, [answer["cells"].get(key, missing) for key in places])
    right_table = long_run(work / "sp", work / "long")
    run(sys.executable, "-m", "slimpajama_hf", "export", work / "long", "--to", "parquet")
    request = {"table": str(work / "long" / "ledger.parquet"), "expected_table": right_table}
    add(others, ask("in_tables.py", python_of(environments, "tables"), request, work))
    tracking, tracked = python_of(environments, "trackio"), work / "tracked"
    kept = {"TRACKIO_DIR": str(work / "trackio")}
    train(tracked, "builtin", "--report_to", "tensorboard,trackio", python=tracking, **kept)
    losses = [row["loss"] for row in read_ledger(tracked)]
    request = {"run": str(tracked), "losses": losses, "trackio": str(work / "trackio")}
    add(others, ask("in_trackers.py", tracking, request, work, **kept))
    harness = python_of(environments, "harness")
    version = run(
        harness, "-c", "import trl, torchdata; print('TRL', trl.__version__, 'torchdata', torchdata.__version__)"
    )
    others.add(
        version.strip(), [{"examples/trl_sft.py killed and gone on with; StatefulDataLoader": scripts_in(harness)}]
    )
    sys.stdout.write(f"{datetime.date.today()}\n\n{models}\n\n{others}\n")
    return 1 if models.notes or others.notes else 0


def scripts_in(python: Path) -> str:
    """The tests of `anywhere/` that want what is not in the environment of the tests; what is wrong."""
    tests = ["tests/anywhere/test_examples.py", "tests/anywhere/test_exact_stream.py"]
    try:
        run(python, "-m", "pytest", "-q", "-n", "0", *tests, "-k", "trl_sft or torchdata")
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]
    return ""


def add(table: Table, answer: dict[str, Any]) -> None:
    """A row for each check of a client that is asked about one thing."""
    cells = answer["cells"].get("-", {answer.get("error", "-"): answer.get("error", "it did not answer")})
    for name, why in cells.items():
        compared = "every step" if name in ("tensorboard", "trackio") else "rows, sums, types, columns null at first"
        table.add(f"{name} {answer['versions'].get(name, '')}".strip(), [{compared: why}])


def fetch(python: Path, hub: LoopbackModelHub, repo: str, clone: Path) -> str:
    """Fetch a repository by the command of the Hub's own library; what is wrong with the files."""
    with tempfile.TemporaryDirectory() as home:
        run(
            python,
            "-m",
            "huggingface_hub.cli.hf",
            "download",
            repo,
            "--local-dir",
            clone,
            HF_HOME=home,
            **hub.environment(None),
        )
    files = hub.models[repo].files
    wrong = [name for name, content in files.items() if (clone / name).read_bytes() != content]
    return f"other bytes in {', '.join(wrong)}" if wrong else ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        os.environ["SLIMPAJAMA_HF_CACHE"] = str(Path(folder) / "cache")
        raise SystemExit(main(Path(sys.argv[1]).absolute(), Path(folder)))
