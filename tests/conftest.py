"""Real shards made here, a real tokenizer, the real command line in a process of its own."""

from __future__ import annotations

import atexit
import gc
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fork_server import Forked, ForkServer

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Children that compile every module of ours anew take a quarter of a second each for it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# No test may reach the outside: the Hub of the tests is a loopback server, or nothing.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_XET"] = "1"
# The key by which runs are marked is one of the tests, wherever the home of their user is.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="state-of-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

DOMAINS = ("RedPajamaC4", "RedPajamaGithub", "RedPajamaWikipedia", "RedPajamaStackExchange")
_WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "that",
    "with",
    "as",
    "it",
    "by",
    "at",
    "from",
    "his",
    "an",
    "were",
    "are",
    "which",
    "this",
    "be",
    "or",
    "had",
    "not",
    "but",
    "also",
    "one",
    "two",
    "river",
    "city",
    "energy",
    "light",
    "people",
    "number",
    "system",
    "world",
    "music",
    "water",
    "stone",
    "field",
    "paper",
    "engine",
    "garden",
    "letter",
]


def make_text(seed: int, words: int) -> str:
    """English-looking text of our own: sentences of common words, the same for the same seed."""
    draw = random.Random(seed)
    sentences, left = [], words
    while left > 0:
        size = min(left, draw.randint(4, 14))
        sentence = " ".join(draw.choice(_WORDS) for _ in range(size))
        sentences.append(sentence.capitalize() + draw.choice([".", ".", "?", ";"]))
        left -= size
    return " ".join(sentences)


def make_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records in SlimPajama's shape, 5 to 700 words long."""
    draw = random.Random(seed)
    return [
        {
            "text": make_text(seed * 100_003 + number, draw.choice([5, 40, 150, 300, 700])),
            "meta": {"redpajama_set_name": DOMAINS[number % len(DOMAINS)]},
        }
        for number in range(count)
    ]


def write_records(path: Path, records: list[Any]) -> Path:
    """Records as .jsonl, .jsonl.zst, .jsonl.gz or .parquet, by the name; a str is written as a raw line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
        return path
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    if path.suffix == ".zst":
        from backports import zstd

        data = zstd.compress(data)
    elif path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in SlimPajama's layout: three .jsonl.zst shards of 30 records."""
    folder = tmp_path_factory.mktemp("shards") / "train" / "chunk1"
    for number in range(3):
        write_records(folder / f"example_train_{number}.jsonl.zst", make_records(30, seed=number + 1))
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the embedded corpus of the tests lives; every process of the suite shares it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SLIMPAJAMA_HF_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def encoder() -> Any:
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    return Encoder(load_tokenizer("builtin"))


def a_token_for_each_word() -> Any:
    """A tokenizer to which a text is as many tokens as it has words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate(["<unk>", "<|endoftext|>", *_WORDS])}, unk_token="<unk>"
        )
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<|endoftext|>")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Load what nearly every file needs, as the program does (`loading.py`): each `gc.collect()` of a Trainer would walk
    over it for a second, a minute of the whole suite. A few tests alone are sooner done without."""
    if len(session.items) > 200:
        gc.disable()
        from transformers import Trainer  # noqa: F401

        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a sweep that is marked `first(n)` all but the first n are slow."""
    seen: dict[str, int] = {}
    for item in items:
        mark = item.get_closest_marker("first")
        if mark is not None:
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, 0) + 1
            if seen[name] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


#: A model that takes milliseconds a step.
NANO = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=32,n_head=2", "--tokenizer", "builtin"]
#: Of which nothing is drawn and no sample written: half of what a short run costs.
NANO_UNSEEN = [*NANO, "--viz_interval", "0", "--display_samples", "0"]

Command = Callable[..., subprocess.CompletedProcess[str]]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: no Hub, quiet, one thread (two cores are shared by everything)."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


_FORK_SERVER = ForkServer(environment())
atexit.register(_FORK_SERVER.close)


def python(
    *arguments: str, timeout: float = 200, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` (`script.py ...` or `-m module ...`) in a process of its own, its output as text."""
    env = environment(**variables)
    if _FORK_SERVER.takes(env):
        return _FORK_SERVER.run(list(arguments), env, cwd, timeout)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd
    )


def start_script(
    *flags: str, stdout: Any = None, stderr: Any = None, **variables: str
) -> subprocess.Popen[str] | Forked:
    """`python run_clm_slimpajama.py FLAGS`, begun and not waited for."""
    env, arguments = environment(**variables), [str(ROOT / "run_clm_slimpajama.py"), *flags]
    if _FORK_SERVER.takes(env):
        return _FORK_SERVER.start(arguments, env, ROOT, stdout, stderr)
    return subprocess.Popen([sys.executable, *arguments], text=True, env=env, cwd=ROOT, stdout=stdout, stderr=stderr)


def run_script(*flags: str, timeout: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python run_clm_slimpajama.py FLAGS`."""
    return python(str(ROOT / "run_clm_slimpajama.py"), *flags, timeout=timeout, **variables)


def run_command(*words: str, timeout: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m slimpajama_hf WORDS`."""
    return python("-m", "slimpajama_hf", *words, timeout=timeout, **variables)


def read_ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A whole run by the real command line: 40 steps, a checkpoint and a sample every 10, a chart every 20."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    done = run_script(
        *NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "40", "--save_steps", "10", "--display_samples", "10",
        "--viz_interval", "20", "--warmup_steps", "20", "--output_dir", str(run), "--precision", "float32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run.parent / "stderr.txt").write_text(done.stderr)
    return run


@pytest.fixture(scope="session")
def fault_table(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Rows of the table that `make test-faults` prints; kept in the file that $FAULT_TABLE names, if it is set."""

    def add(
        fault: str, injected: int, *, lost: int = 0, repeated: int = 0, checkpoints: int = 0, bit_equal: bool | None
    ) -> None:
        """`bit_equal` None: no two runs were compared, for the reason that the fault's name gives."""
        path = os.environ.get("FAULT_TABLE")
        if path:
            row = {"fault": fault, "injected": injected, "documents lost": lost, "documents repeated": repeated,
                   "checkpoints lost": checkpoints, "bit-equal": {True: "yes", False: "no", None: "-"}[bit_equal]}  # fmt: skip
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return add


def without_sum(run: Path) -> None:
    """Leave out of `run.json` what older versions did not write: the sum of the flags in `run_config.yaml`."""
    record = json.loads((run / "run.json").read_text())
    del record["config_sha256"]
    (run / "run.json").write_text(json.dumps(record))
