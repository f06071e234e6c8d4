"""The plan of the house: which wing stands on which, no circle, and nothing heavy where it is not needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slimpajama_hf
from tests.conftest import ROOT, environment

PACKAGE = ROOT / "slimpajama_hf"

#: The wings, each with those that it may import from; the files on top of the package belong to all of them.
WINGS: dict[str, set[str]] = {
    "settings": set(),
    "corpus": set(),
    "record": set(),
    "samples": {"corpus"},
    "model": {"settings"},
    "views": {"record"},
    "report": {"views", "record", "corpus"},
    "training": {"samples", "model", "record", "corpus", "settings"},
    "lookback": {"views", "samples", "record", "corpus", "settings"},
}
for _wing in ("hub", "watching", "session", "anywhere", "commands"):
    WINGS[_wing] = set(WINGS)

#: Files on top that begin a program: they stand on the wings, and no wing on them.
PROGRAMS = {"__main__", "program"}

#: Of transformers' Trainer these know nothing.
WITHOUT_THE_TRAINER = ("settings", "corpus", "record", "samples", "model", "views", "report", "lookback")

#: Text and numbers know nothing of the model that they came from.
WITHOUT_TORCH = (
    "bars", "errors", "files", "palette", "screen", "terminal", "program",
    "settings.arguments", "settings.flags", "settings.settings", "settings.yaml_file",
    "corpus.corpus", "corpus.documents", "corpus.embedded", "corpus.hub_files", "corpus.opening", "corpus.patience",
    "corpus.formats", "corpus.local_files", "corpus.shards", "corpus.sniffing", "corpus.unchanged", "corpus.unpacking",
    "samples.cutting", "samples.encoder", "samples.handed_on", "samples.passes", "samples.pieces", "samples.portable_tokenizer",
    "samples.read_ahead", "samples.sample",
    "samples.stream", "samples.tokenizer",
    "record.checkpoints", "record.columns", "record.ledger", "record.lock", "record.run_folder", "record.spikes",
    "record.surprisals",
    "views.charts", "views.drawing", "views.ledger_table", "views.views", "report", "report.live", "report.machine",
    "report.server", "report.several", "report.watch", "training.signals",
    "lookback.checks", "lookback.comparison", "lookback.comparison_chart", "lookback.gguf_file", "lookback.inspection",
    "lookback.replay", "lookback.reread", "lookback.rewind", "lookback.run", "lookback.search_finding",
    "lookback.search_growing", "lookback.search_index", "lookback.search_losses", "lookback.side_by_side",
    "watching.view_process", "session.command_line", "session.resume",
    "commands.compare", "commands.completion", "commands.evaluate", "commands.export", "commands.generate",
    "commands.inspect", "commands.plan", "commands.push", "commands.report", "commands.rewind", "commands.schema",
    "commands.tokenizer", "commands.train", "commands.verify", "commands.views",
)  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_module_imports_without_torch_or_the_trainer(name):
    code = (
        f"import slimpajama_hf.{name}, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'evaluate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr


def modules(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.glob("**/*.py"))


def name_of(path: Path, package: Path = PACKAGE) -> str:
    """`errors`, `report`, `report.page`; the package itself is ""."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path, known: set[str]) -> dict[str, int]:
    """Our own modules that a file imports, and in which line: at its top, inside functions, and for types alone."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are written out from slimpajama_hf on"
            if (node.module or "").partition(".")[0] != "slimpajama_hf":
                continue
            inside = (node.module or "").removeprefix("slimpajama_hf").lstrip(".")
            # A module inside a package (`from slimpajama_hf.report import page`), or a name inside a module.
            for name in (f"{inside}.{alias.name}".lstrip(".") for alias in node.names):
                found.setdefault(name if name in known else inside, node.lineno)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "slimpajama_hf":
                    found.setdefault(alias.name.removeprefix("slimpajama_hf").lstrip("."), node.lineno)
    return found


def graph(package: Path = PACKAGE) -> dict[str, dict[str, int]]:
    """What each module imports, and in which line."""
    paths = {name_of(path, package): path for path in modules(package)}
    return {name: imported(path, set(paths)) for name, path in paths.items()}


def broken_laws(package: Path = PACKAGE) -> list[str]:
    """Each import that the plan does not have, as `line: a imports b`."""
    broken = []
    for name, others in graph(package).items():
        wing = name.partition(".")[0]
        if wing in PROGRAMS or not name:
            continue
        for other, line in others.items():
            of = other.partition(".")[0]
            allowed = of in (WINGS[wing] | {wing}) if wing in WINGS else of not in WINGS
            if of in PROGRAMS or (of in WINGS and not allowed):
                broken.append(f"line {line}: {name} imports {other}")
    return broken


def circles(package: Path = PACKAGE) -> set[str]:
    """Modules that cannot be put below one another, however late they import each other."""
    needs = {name: set(others) - {name, ""} for name, others in graph(package).items()}
    done: set[str] = {""}
    while ready := {name for name in needs if name not in done and needs[name] <= done}:
        done |= ready
    left = set(needs) - done
    # What only stands on a circle is not in it.
    while free := {name for name in left if not any(name in needs[other] for other in left)}:
        left -= free
    return left


def test_every_wing_stands_on_those_that_the_plan_says():
    assert broken_laws() == []


def test_every_folder_is_a_wing_and_every_wing_a_folder():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(WINGS)


def test_there_is_no_circle():
    """Not at import time, not later inside a function, and not for types alone."""
    found, needs = circles(), graph()
    assert not found, {name: sorted(set(needs[name]) & found) for name in found}


@pytest.mark.parametrize("late", ["", "    def late(self):\n        ", "    if True:\n        "])
def test_a_late_import_is_seen(tmp_path, late):
    """Two files that need each other, and one that reaches upwards: wherever the import stands it is found."""
    package = tmp_path / "slimpajama_hf"
    for name, other in (("record/ledger", "training.trainer"), ("training/trainer", "record.ledger")):
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True)
        (file.parent / "__init__.py").write_text("")
        wing, _, module = other.partition(".")
        head = "class It:\n" if late else ""
        file.write_text(f"{head}{late}from slimpajama_hf.{wing} import {module}\n")
    (package / "__init__.py").write_text("")
    assert circles(package) == {"record.ledger", "training.trainer"}
    assert [line.partition(": ")[2] for line in broken_laws(package)] == ["record.ledger imports training.trainer"]


@pytest.mark.parametrize(
    "path", [ROOT / "run_clm_slimpajama.py", *sorted((ROOT / "examples").glob("*.py"))], ids=lambda path: path.stem
)
def test_the_script_and_the_examples_use_public_names_alone(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in whole if name.startswith("slimpajama_hf")]
    ours = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("slimpajama_hf")]
    assert all(node.module == "slimpajama_hf" for node in ours)
    assert {alias.name for node in ours for alias in node.names} <= set(slimpajama_hf.__all__)


def test_nothing_of_the_program_stands_on_its_public_face():
    """`anywhere` gives what is there to scripts, ours and those of others; no other wing needs it."""
    users = {name for name, others in graph().items() for other in others if other.startswith("anywhere")}
    assert all(name.startswith("anywhere") or name == "" for name in users), users


def test_the_public_face_is_imported_when_it_is_asked_for():
    """`import slimpajama_hf` is as fast as it was; every public name is there, and nothing else."""
    code = (
        "import slimpajama_hf, sys\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "for name in slimpajama_hf.__all__: getattr(slimpajama_hf, name)\n"
        "try: slimpajama_hf.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise AssertionError"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wing", WITHOUT_THE_TRAINER)
def test_below_training_nothing_knows_the_trainer(wing):
    for path in (PACKAGE / wing).glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
                names = {alias.name for alias in node.names}
                assert not names & {"Trainer", "TrainerCallback", "PrinterCallback"}, f"{path}:{node.lineno}"


def test_matplotlib_is_imported_by_one_module_first():
    """It refuses to be imported where MPLBACKEND names what is not installed (`agg.py`)."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        text = text.replace(text.partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0], "")
        first = re.search(r"^ *(import|from) matplotlib\b", text, re.M)
        assert first is None or name_of(path) == "agg" or "from slimpajama_hf.agg import" in text[: first.start()], path


def test_no_drawer_of_odds_and_ends():
    assert not {path.stem for path in modules()} & {"utils", "helpers", "common", "misc"}


def test_the_script_fits_on_one_screen():
    assert len((ROOT / "run_clm_slimpajama.py").read_text().splitlines()) <= 120


#: Longer than this no file is a page that one reads.
LONGEST = 450


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_too_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize(
    "path", [*modules(), ROOT / "run_clm_slimpajama.py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_public_thing_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            one_liner = isinstance(node, ast.FunctionDef) and len(node.body) <= 2
            if not ast.get_docstring(node) and not one_liner and node.name != "main":
                missing.append(node.name)
    assert ast.get_docstring(tree) and not missing, missing
