"""What README.md and the pages of docs/ say is so: commands parse, targets and files exist, fields are in the ledger."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from slimpajama_hf import __main__
from slimpajama_hf.record.ledger import Row
from slimpajama_hf.session import command_line
from slimpajama_hf.settings import flags
from slimpajama_hf.settings.arguments import OURS, TRAINING_DEFAULTS
from tests.conftest import ROOT, read_ledger

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README, CONTRIBUTING = (path.read_text(encoding="utf-8") for path in PAGES[:2])
FLAGS, RUN_FOLDER = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("flags.md", "run-folder.md"))


def lines_of(path: Path) -> list[str]:
    """The command lines of a page, without what is optional or a comment."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    whole = (block.replace("\\\n", " ") for block in blocks)
    return [
        re.sub(r"\[.*?\]|&$", "", re.split(r" +# ", line)[0]).strip() for block in whole for line in block.splitlines()
    ]


#: Those of each page that starts the program or a command of it.
LINES = [(path.name, line) for path in PAGES for line in lines_of(path)]


@pytest.mark.parametrize("line", sorted({line for _, line in LINES if " run_clm_slimpajama.py" in line}))
def test_training_commands_parse(line):
    words = shlex.split(line)
    # Not `parse`: a line that goes on from a repository would ask the Hub for it.
    assert flags.read_flags(words[words.index("run_clm_slimpajama.py") + 1 :])


def test_no_training_command_fails_because_of_one_before_it():
    """Each that begins a run does so in a folder of its own, and so does what --test and the configurations begin."""
    folders: dict[str, str] = {}
    for line in [*lines_of(ROOT / "README.md"), "run_clm_slimpajama.py --test"]:
        words = shlex.split(line)
        if "run_clm_slimpajama.py" not in words or "--resume_from_checkpoint" in words:
            continue
        folder = flags.read_flags(words[words.index("run_clm_slimpajama.py") + 1 :]).output_dir
        assert folder not in folders, (line, folders[folder])
        folders[folder] = line
    assert len(folders) > 2


@pytest.mark.parametrize("line", sorted({line for _, line in LINES if "-m slimpajama_hf" in line}))
def test_other_commands_parse(line):
    words = shlex.split(line)
    words = words[words.index("slimpajama_hf") + 1 :]
    # The flags of a plan are those of the training that it plans.
    assert command_line.parse(words[1:]) if words[0] == "plan" else __main__._parser().parse_args(words)


@pytest.mark.parametrize("line", sorted({line for _, line in LINES if line.startswith("make ")}))
def test_targets_exist(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_every_target_has_its_line_of_help():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    assert set(phony) == set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))


def test_named_flags_and_files_exist():
    flags = {field for group in OURS for field in group.__dataclass_fields__} | set(TRAINING_DEFAULTS)
    flags |= {"steps", "checkpoint_interval", "config", "help", "prompt", "vocab_size", "output"}
    flags |= {"quiet", "num_cpu_threads_per_process", "find", "watch"}  # accelerate launch's own
    for flag in re.findall(r"(?<![-\w])--([a-z][a-z0-9_-]*)", re.sub(r"```.*?```", "", README + FLAGS, flags=re.S)):
        assert flag.replace("-", "_") in flags, flag
    for path in re.findall(r"`((?:slimpajama_hf|configs|docs)/[\w./-]+)`|\]\((docs/[\w./-]+)\)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path


def test_the_tree_of_the_house_has_each_folder_with_its_own_sentence():
    tree = re.search(r"```\nslimpajama_hf/\n(.*?)```", README, re.S).group(1)
    said = dict(re.findall(r"^[├└]── (\w+)/ +(.+)$", tree, re.M))
    assert len(said) == tree.count("\n")
    folders = {path.parent.name: path for path in (ROOT / "slimpajama_hf").glob("*/__init__.py")}
    docstrings = {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for name, path in folders.items()}
    assert said == {name: text.splitlines()[0] for name, text in docstrings.items()}


def test_names_in_where_to_add_things_are_in_the_files_of_their_row():
    table = CONTRIBUTING.partition("## Where to add things")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (?!to add|-)(.*) \|$", table, re.M):
        paths = re.findall(r"`(slimpajama_hf/[\w./]+)`", row)
        texts = [(ROOT / path).read_text("utf-8") for path in paths if not path.endswith("/")]
        texts += [
            file.read_text("utf-8") for path in paths if path.endswith("/") for file in (ROOT / path).glob("*.py")
        ]
        assert texts, row
        for name in re.findall(r"`(\w[\w.]*)(?:\(\w*\))?`", row):
            assert any(re.search(rf"\b{name.rpartition('.')[2]}\b", text) for text in texts), (name, row)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path):
    """To a file, and where a link names a place in it, to that place."""
    for target, place in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", path.read_text("utf-8")):
        found = path.parent / target if target else path
        assert found.exists(), target
        if place:
            page = found.read_text("utf-8")
            headings = {"-".join(re.findall(r"[\w-]+", line.lower())) for line in re.findall(r"^#+ (.*)$", page, re.M)}
            assert place in headings | set(re.findall(r'<a id="([\w-]+)">', page)), (target, place)


def test_the_row_and_the_folder_are_as_described(finished):
    sentence = re.search(r"A row of the ledger: (.*?)\n\n", RUN_FOLDER, re.S).group(1)
    named = set(re.findall(r"`([a-z_0-9]+)`", sentence))
    assert set(Row.__dataclass_fields__) - {"added"} | {"chain"} <= named
    assert set(read_ledger(finished)[0]) <= named
    tree = re.search(r"```\nruns/.*?```", RUN_FOLDER, re.S).group(0)
    for path in finished.rglob("*"):
        name = re.sub(r"checkpoint-\d+", "checkpoint-2000", str(path.relative_to(finished).parts[0]))
        assert name in tree, name
