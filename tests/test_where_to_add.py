"""CONTRIBUTING.md's table "Where to add things" is true: each change is made in a scratch copy, where it says, and works there."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import NANO, ROOT, make_records, python, read_ledger, write_records
from tests.hub.loopback_hub import LoopbackHub


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the program that may be changed."""
    copy = tmp_path / "house"
    for name in ("slimpajama_hf", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_clm_slimpajama.py", copy)
    return copy


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_records(tmp_path / "corpus.jsonl", make_records(30))
    return tmp_path / "corpus.jsonl"


def change(house: Path, name: str, *replaced: tuple[str, str]) -> None:
    """Put something behind each first text, which is in the file once."""
    path = house / "slimpajama_hf" / name
    text = path.read_text()
    for anchor, more in replaced:
        assert text.count(anchor) == 1, (name, anchor)
        text = text.replace(anchor, anchor + more)
    path.write_text(text)


def run(house: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    done = python(*words, cwd=house, PYTHONPATH=str(house), **variables)
    assert done.returncode == 0, done.stderr
    return done


def run_text(house: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    (house / "program.py").write_text(program)
    return run(house, "program.py", *words)


def train(house: Path, corpus: Path, folder: Path, *flags: str, steps: int = 6) -> subprocess.CompletedProcess[str]:
    return run(
        house, "run_clm_slimpajama.py", *NANO, "--dataset", str(corpus), "--output_dir", str(folder), "--precision",
        "float32", "--max_steps", str(steps), *flags,
    )  # fmt: skip


WEIGHT_NORM = """
    weight_norm: Any = number(
        "L2 norm of all weights",
        lambda model: torch.stack([weight.norm() for weight in model.parameters()]).norm(),
    )"""


def add_weight_norm(house: Path) -> None:
    change(house, "training/step_numbers.py", ('"""Loss of the next document before this update."""', WEIGHT_NORM))


def test_a_number_per_step_is_one_place_and_appears_everywhere(house, corpus, tmp_path):
    add_weight_norm(house)
    folder = tmp_path / "run"
    train(house, corpus, folder, "--save_steps", "3", "--report_to", "tensorboard")
    rows = read_ledger(folder)
    # Measured after the update of its step, with which the checkpoint was saved.
    weights = load_file(folder / "checkpoint-6" / "model.safetensors")
    norm = float(np.sqrt(sum(np.square(each.astype(np.float64)).sum() for each in weights.values())))
    assert rows[5]["weight_norm"] == pytest.approx(norm, rel=1e-5)
    assert len({row["weight_norm"] for row in rows}) == 6

    history = json.loads((folder / "training_viz" / "metrics_history.json").read_text())
    assert history["weight_norm"] == [row["weight_norm"] for row in rows]
    assert json.loads((folder / "run.json").read_text())["numbers"] == {"weight_norm": "L2 norm of all weights"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    sent = [event.value for event in events.Scalars("train/weight_norm")]
    assert sent == pytest.approx([row["weight_norm"] for row in rows], rel=1e-6)

    told = run(house, "-m", "slimpajama_hf", "inspect", str(folder), "--step", "4").stdout
    assert "weight norm" in told and f"{rows[4]['weight_norm']:.4f}" in told

    content = run_text(
        house,
        "import json, sys; from pathlib import Path\n"
        "from slimpajama_hf.record.columns import Reader; from slimpajama_hf.record.run_folder import RunFolder\n"
        "from slimpajama_hf.report import content\n"
        "meta, arrays = content.gather(RunFolder(Path(sys.argv[1])), Reader(Path(sys.argv[1]) / 'ledger.jsonl'))\n"
        "print(json.dumps([meta['added'], arrays['added:weight_norm'].tolist()]))",
        str(folder),
    ).stdout  # fmt: skip
    added, values = json.loads(content)
    assert added == [{"name": "weight_norm", "meaning": "L2 norm of all weights"}]
    assert values == pytest.approx([row["weight_norm"] for row in rows], rel=1e-6)

    # Nothing else moved: what the other numbers are, and what belongs to them.
    run(house, "-m", "slimpajama_hf", "verify", str(folder))
    plain = tmp_path / "plain"
    train(ROOT, corpus, plain, "--save_steps", "3")
    clock = {"throughput", "step_seconds", "chain", "weight_norm"}
    for row, without in zip(rows, read_ledger(plain), strict=True):
        assert {k: v for k, v in row.items() if k not in clock} == {k: v for k, v in without.items() if k not in clock}
    assert (folder / "surprisals.f32").read_bytes() == (plain / "surprisals.f32").read_bytes()


@pytest.mark.long
def test_a_number_per_step_is_there_with_several_samples_in_a_step_too(house, corpus, tmp_path):
    add_weight_norm(house)
    folder = tmp_path / "run"
    train(house, corpus, folder, "--gradient_accumulation_steps", "2", steps=4)
    rows = read_ledger(folder)
    assert len({row["weight_norm"] for row in rows}) == 4 and all(len(row["samples"]) == 2 for row in rows)
    run(house, "-m", "slimpajama_hf", "verify", str(folder))


@pytest.mark.long
def test_a_chart_panel(house, corpus, tmp_path):
    change(
        house, "views/charts.py",
        ('PANELS: list[Panel] = [\n', '    Panel("lengths", "Tokens by step", draw_lengths, row=1, weight=4.0),\n'),
        ("    left: float = LEFT\n",
         "\n\ndef draw_lengths(ax, columns, samples):\n    ax.plot(columns.step, columns.tokens)\n"),
    )  # fmt: skip
    folder = tmp_path / "run"
    train(house, corpus, folder)
    done = run_text(
        house,
        "import sys; from pathlib import Path\n"
        "from slimpajama_hf.record.columns import read_columns; from slimpajama_hf.views import charts\n"
        "figure = charts.draw(read_columns(Path(sys.argv[1]) / 'ledger.jsonl'), [], charts.Caption('a', 'b', 6))\n"
        "[ax] = [ax for ax in figure.axes if ax.get_gid() == 'lengths']\n"
        "print(ax.get_title(loc='left'), len(ax.lines[0].get_xdata()))",
        str(folder),
    )  # fmt: skip
    assert done.stdout.split() == ["Tokens", "by", "step", "6"]


@pytest.mark.long
def test_a_corpus(house, tmp_path):
    change(
        house, "corpus/opening.py",
        ("CORPORA: dict[str, tuple[Mirror, ...]] = {\n",
         f'    "mine": (Mirror("me/mine", "{"ab" * 20}", ("data/train-",), ("data/validation-",)),),\n'),
    )  # fmt: skip
    write_records(tmp_path / "hub" / "data" / "train-0.jsonl.zst", make_records(30))
    with LoopbackHub() as server:
        server.datasets["me/mine"] = tmp_path / "hub"
        folder = tmp_path / "run"
        run(
            house, "run_clm_slimpajama.py", *NANO, "--dataset", "mine", "--output_dir", str(folder), "--max_steps", "5",
            HF_ENDPOINT=server.url,
        )  # fmt: skip
    assert {row["mirror"] for row in read_ledger(folder)} == {f"me/mine@{'ab' * 6}"}


@pytest.mark.long
def test_a_kind_of_tokenizer(house, corpus, tmp_path):
    change(
        house, "samples/tokenizer.py",
        ("    if source == BUILTIN:\n        return from_sentencepiece(BUILTIN_MODEL)\n",
         '    if source == "bytes":\n'
         "        import tokenizers\n"
         "        from transformers import PreTrainedTokenizerFast\n\n"
         "        signs = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())\n"
         "        vocabulary = {sign: number for number, sign in enumerate([*signs, '<end>'])}\n"
         "        plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))\n"
         "        plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)\n"
         "        plain.decoder = tokenizers.decoders.ByteLevel()\n"
         "        return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token='<end>')\n"),
    )  # fmt: skip
    folder = tmp_path / "run"
    train(house, corpus, folder, "--tokenizer", "bytes", steps=3)
    assert json.loads((folder / "run.json").read_text())["tokenizer"] == "bytes"


@pytest.mark.long
def test_a_command(house, corpus, tmp_path):
    (house / "slimpajama_hf" / "commands" / "count.py").write_text(
        '"""`count`: counts the steps of a run."""\n\n'
        'HELP = "count the steps of a run"\n\n\n'
        "def add_arguments(parser):\n"
        '    parser.add_argument("run")\n\n\n'
        "def main(options):\n"
        '    print(len(open(options.run + "/ledger.jsonl").readlines()))\n'
        "    return 0\n"
    )
    folder = tmp_path / "run"
    train(house, corpus, folder)
    assert run(house, "-m", "slimpajama_hf", "count", str(folder)).stdout == "6\n"
    assert "count the steps of a run" in run(house, "-m", "slimpajama_hf", "--help").stdout


@pytest.mark.long
def test_a_callback_that_watches(house, corpus, tmp_path):
    (house / "slimpajama_hf" / "watching" / "shout.py").write_text(
        "from transformers import TrainerCallback\n\nfrom slimpajama_hf import screen\n\n\n"
        "class Shout(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        '        screen.say(f"SHOUT {state.global_step}")\n'
    )
    change(
        house, "watching/watchers.py",
        ("from slimpajama_hf.watching.prompts import FixedPrompts\n", "from slimpajama_hf.watching.shout import Shout\n"),
        ("return [*asking, ", "Shout(), "),
    )  # fmt: skip
    said = train(house, corpus, tmp_path / "run").stderr
    assert [line for line in said.splitlines() if "SHOUT" in line] == [f"SHOUT {step}" for step in range(1, 7)]
