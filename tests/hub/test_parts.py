"""Parts of pushing and fetching, each by itself."""

from __future__ import annotations

import json
import os

import pytest

from slimpajama_hf import priority
from slimpajama_hf.hub import fetch, staging, stranger, upload_process
from slimpajama_hf.hub.account import Destination
from slimpajama_hf.views import model_card


@pytest.mark.parametrize(
    ("asked", "is_one"),
    [
        ("me/run", True),
        ("me/run@v1", True),
        ("runs/x/checkpoint-20", False),
        ("true", False),
        ("a/b/c", False),
        ("/a/b", False),
    ],
)
def test_what_names_a_repository(asked, is_one):
    assert fetch.is_repo(asked) == is_one
    if is_one:
        assert fetch.folder_for(asked) == "runs/run"


@pytest.mark.parametrize(
    ("word", "up"),
    [
        ("/home/me/data/*.jsonl", "*.jsonl"),
        ("--dataset=~/x/y.txt", "--dataset=y.txt"),
        ("--seed=3", "--seed=3"),
        ("me/run", "me/run"),
        ("..", ".."),
    ],
)
def test_of_a_path_of_this_machine_the_last_part_goes_up(word, up):
    assert staging.without_path(word) == up


def test_a_token_in_a_command_does_not_go_up():
    record = {
        "corpus": {"name": "/data/x.jsonl", "files": [["x.jsonl", "/data/x.jsonl", 5], ["y", "hf://datasets/a/b@c/y"]]},
        "command": ["run.py", "--hub_token", "secret", "--hub-token=secret", "--seed", "3"],
        "tokenizer": "/t/tokenizer.json", "model": {"name": "/m/config.json"},
    }  # fmt: skip
    up = staging.without_paths(record)
    assert up["command"] == ["run.py", "--seed", "3"]
    assert up["corpus"]["files"] == [["x.jsonl", "x.jsonl", 5], ["y", "hf://datasets/a/b@c/y"]]
    assert record["command"][2] == "secret", "what is here stays as it is"


def test_text_of_a_document_is_plain_words_on_the_card():
    assert model_card.escaped("<b>*x*</b>\x1b[31m") == "&#60;b&#62;&#42;x&#42;&#60;&#47;b&#62;␛&#91;31m"
    assert model_card.hub_corpus({"corpus": {"files": [], "mirror": "local", "repo": None, "revision": None}}) is None
    assert "secret" not in " ".join(model_card.repeatable(["run.py", "--hub_token", "secret", "--seed", "3"]))


def test_a_destination_travels_as_json_and_its_token_is_not_shown():
    destination = Destination("me/run", "a-very-secret-token", private=True)
    assert Destination(**json.loads(json.dumps(upload_process.fields(destination)))) == destination
    assert "a-very-secret-token" not in repr(destination)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no such priorities on this system")
def test_what_stands_back_comes_forward_when_it_is_waited_for():
    child = os.fork()
    if not child:
        priority.stand_back()
        priority.come_forward(os.getpid()) if os.geteuid() == 0 else None
        os._exit(0 if os.sched_getscheduler(0) == (os.SCHED_OTHER if os.geteuid() == 0 else os.SCHED_IDLE) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("asked", "recorded", "is_path"),
    [
        ("auto", "builtin", False),
        ("gpt2", "gpt2", False),
        ("me/tokenizer", "me/tokenizer", False),
        ("a/b/c.json", "x", True),
        ("/t", "/t", True),
        ("x.model", "x.model", True),
    ],
)
def test_a_tokenizer_that_was_a_file_is_known(asked, recorded, is_path):
    assert stranger._was_a_path(asked, recorded) == is_path
