"""What a client is asked, and how it answers. Runs inside its environment, which knows nothing of this project."""

import contextlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np


class Expected:
    """What is right for one model: of each text its ids, logits (tokens, vocabulary) and greedy continuation."""

    def __init__(self, about, arrays):
        self.texts, self.ids, self.greedy = about["texts"], about["ids"], about["greedy"]
        self.greedy_ids, self.new_tokens = about["greedy_ids"], about["new_tokens"]
        self.loss_with_eos = about["loss_with_eos"]
        self.logits = [arrays[f"logits-{number}"] for number in range(len(self.texts))]


class Answers:
    """`cells[model][check]` is "" where it holds, else what was found instead."""

    def __init__(self, path):
        self.request = json.loads(Path(path).read_text(encoding="utf-8"))
        self.about, self.cells, self._model = {}, {}, "-"

    def versions(self, *modules):
        self.about |= {module.__name__: module.__version__ for module in modules}

    def models(self):
        """(what to load, what is right) of each model."""
        for key, entry in self.request["models"].items():
            about = json.loads(Path(entry["expected"] + ".json").read_text(encoding="utf-8"))
            self._model = key
            yield entry["model"], Expected(about, np.load(entry["expected"] + ".npz"))

    @contextlib.contextmanager
    def check(self, name):
        try:
            yield
            said = ""
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.cells.setdefault(self._model, {})[name] = said

    def true(self, holds, why):
        if not holds:
            raise ValueError(why)

    def equal(self, found, right):
        self.true(found == right, f"found {found!r} instead of {right!r}")

    def close(self, found, right, tolerance=2e-5):
        apart = np.abs(np.asarray(found, np.float64) - np.asarray(right, np.float64)).max()
        self.true(apart <= tolerance, f"apart by {apart:.2g}, more than {tolerance:g}")

    def end(self):
        sys.stdout.write("\n" + json.dumps({"versions": self.about, "cells": self.cells}) + "\n")
