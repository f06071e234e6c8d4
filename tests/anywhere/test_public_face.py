"""What is public is on its page, with its parameters, and nothing else is called public."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

import slimpajama_hf
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "two-lines.md").read_text(encoding="utf-8")
NAMES = [name for name in slimpajama_hf.__all__ if not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_on_its_page_with_every_parameter(name):
    said = re.search(rf"^\*\*`{name}\((.*?)\)`\*\*", PAGE, re.M | re.S)
    assert said, name
    parameters = list(inspect.signature(getattr(slimpajama_hf, name)).parameters)
    assert re.findall(r"(\w+)(?:=[^,]*)?(?:,|$)", said[1].replace("*,", "")) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_docstring_and_an_example_in_it(name):
    text = getattr(slimpajama_hf, name).__doc__
    assert text and re.search(r"^ {4,8}(\w+ = )?.*\w+\(", text, re.M), name


@pytest.mark.parametrize("name", NAMES)
def test_what_it_offers_is_annotated(name):
    """The package says that it is typed (`py.typed`)."""
    thing = getattr(slimpajama_hf, name)
    offered = [thing] if inspect.isfunction(thing) else [
        member for key, member in vars(thing).items() if inspect.isfunction(member) and not key.startswith("_")
    ]  # fmt: skip
    for each in offered:
        missing = {key for key, value in inspect.signature(each).parameters.items() if value.annotation is value.empty}
        assert missing <= {"self"} and inspect.signature(each).return_annotation is not inspect.Signature.empty, each


def test_the_page_imports_what_there_is():
    for names in re.findall(r"^from slimpajama_hf import (.*)$", PAGE + (ROOT / "README.md").read_text("utf-8"), re.M):
        assert set(names.split(", ")) <= set(NAMES)


def test_the_page_of_the_public_names_has_each_of_them():
    """docs/python.md is made of their docstrings: what it names is there, and is what a script imports."""
    from slimpajama_hf.anywhere.noise_scale import NoiseScale

    written = re.findall(r"^::: (.+)\.(\w+)$", (ROOT / "docs" / "python.md").read_text("utf-8"), re.M)
    found = {name: getattr(importlib.import_module(module), name) for module, name in written}
    assert found.pop("NoiseScale") is NoiseScale, "what noise_scale returns"
    assert found == {name: getattr(slimpajama_hf, name) for name in slimpajama_hf.__all__ if name != "__version__"}
    assert all(inspect.getdoc(each) for each in found.values())
