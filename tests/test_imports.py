"""Imports run one way, and nothing heavy comes along where it is not needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

PACKAGE = ROOT / "slimpajama_hf"

#: Text and numbers know nothing of the model that they came from.
WITHOUT_TORCH = ("arguments", "charts", "checkpoints", "corpora", "embedded", "errors", "files", "ledger", "palette",
                 "resume", "run_folder", "samples", "screen", "signals", "view_process", "views", "cli", "verify", "patience", "read_ahead", "passes", "shards", "lock", "hub_files",
                 "reread", "inspection", "search_index", "comparison", "rewind", "terminal", "report")  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_module_imports_without_torch_or_the_trainer(name):
    code = (
        f"import slimpajama_hf.{name}, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'evaluate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr


def modules() -> list[Path]:
    return sorted(PACKAGE.glob("**/*.py"))


def name_of(path: Path) -> str:
    """`ledger`, `report`, `report.page`; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Our own modules that a file imports; with `everywhere`, inside functions too (type-only imports left out)."""
    found: set[str] = set()
    known = {name_of(each) for each in modules()}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree) if everywhere else tree.body:
        if id(node) in type_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("slimpajama_hf"):
            inside = (node.module or "").removeprefix("slimpajama_hf").lstrip(".")
            # A module inside a package (`from slimpajama_hf.report import page`), or a name inside a module.
            for name in (f"{inside}.{alias.name}".lstrip(".") for alias in node.names):
                found.add(name if not inside or name in known else inside)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("slimpajama_hf.")
                for alias in node.names
                if alias.name.startswith("slimpajama_hf.")
            }
    return found - {"__version__"}


def test_matplotlib_is_imported_by_one_module_first():
    """It refuses to be imported where MPLBACKEND names what is not installed (`agg.py`)."""
    for path in modules():
        text = path.read_text(encoding="utf-8")
        text = text.replace(text.partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0], "")
        first = re.search(r"^ *(import|from) matplotlib\b", text, re.M)
        assert first is None or name_of(path) == "agg" or "from slimpajama_hf.agg import" in text[: first.start()], path


def test_there_is_no_circle():
    """At import time every module stands on modules below it."""
    graph = {name_of(path): imported(path, everywhere=False) for path in modules()}
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert done == set(graph), {name: needs - done for name, needs in graph.items() if name not in done}


def test_views_and_charts_stand_on_the_ledger_alone():
    # `terminal` stands on nothing: it says what a text is that cannot be seen.
    allowed = {"ledger", "files", "palette", "charts", "run_folder", "checkpoints", "errors", "views",
               "noise", "terminal", "agg"}  # fmt: skip
    assert not imported(PACKAGE / "terminal.py") and not imported(PACKAGE / "agg.py")
    for name in ("ledger", "charts", "palette", "views", "files"):
        assert imported(PACKAGE / f"{name}.py") <= allowed, name


def test_no_drawer_of_odds_and_ends():
    assert not {path.stem for path in modules()} & {"utils", "helpers", "common", "misc"}


def test_the_script_fits_on_one_screen():
    assert len((ROOT / "run_clm_slimpajama.py").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", [*modules(), ROOT / "run_clm_slimpajama.py"], ids=lambda path: path.name)
def test_every_public_thing_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            one_liner = isinstance(node, ast.FunctionDef) and len(node.body) <= 2
            if not ast.get_docstring(node) and not one_liner and node.name != "main":
                missing.append(node.name)
    assert ast.get_docstring(tree) and not missing, missing
