"""The local files that `--dataset` names: one file, a glob, or a folder."""

from __future__ import annotations

import dataclasses
import glob
import os
import stat
from collections import Counter
from pathlib import Path

from slimpajama_hf.corpus import sniffing
from slimpajama_hf.corpus.formats import FORMATS, ending_of
from slimpajama_hf.corpus.shards import Shard, printable, url_of
from slimpajama_hf.errors import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Found:
    """Files in reading order, and a count of what was not read."""

    paths: list[str]
    left_out: Counter[str]
    """Kind, as `.md` or `hidden` -> how many there are."""

    def left_out_in_words(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.most_common(8))


def find(named: str) -> Found:
    """Return the files that `named` means. `~` is the home folder, also in a glob. Broken links are among the files.

    Raises UserError if there are none.
    """
    pattern = os.path.expanduser(named)
    if os.path.isdir(pattern):
        found = _of_folder(pattern)
        if not found.paths:
            there = f"; it holds {found.left_out_in_words()}" if found.left_out else ""
            raise UserError(
                f"--dataset {printable(named)}: no file in this folder can be read{there}; expected "
                f"{', '.join(FORMATS)}"
            )
        return found
    if os.path.lexists(pattern):
        return Found([pattern], Counter())
    paths = sorted(glob.glob(pattern, recursive=True))
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if not os.path.isdir(path)]
    if not files:
        raise UserError(
            f"--dataset {printable(named)}: no such file; expected a file, a folder or a 'glob' of {', '.join(FORMATS)}"
        )
    # In a pattern with `**`, folders are only on the way to the files.
    count = 0 if "**" in pattern else len(folders)
    return Found(files, Counter({f"folder{'s' * (count != 1)}": count}) if count else Counter())


def _of_folder(folder: str) -> Found:
    """Return the files of a folder and its subfolders that have a known ending, sorted by their paths inside it."""
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    been: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in been:
            # A link back to a folder that was read already, perhaps one above.
            folders.clear()
            continue
        been.add((here.st_dev, here.st_ino))
        left_out["hidden"] += sum(name.startswith(".") for name in [*folders, *names])
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith("."):
                continue
            if ending_of(name):
                paths.append(os.path.join(place, name))
            else:
                left_out[Path(printable(name)).suffix or "without an ending"] += 1
    return Found(sorted(paths, key=lambda path: os.path.relpath(path, folder)), +left_out)


def shards(paths: list[str], skip_broken_shards: bool) -> tuple[Shard, ...]:
    """Make shards of the files, after a look at each.

    Raises UserError for a file that is missing, may not be read, has another format or is not what its name says. With
    `skip_broken_shards`, files that cannot be read are left to the reading, which skips them one by one.
    """
    for path in paths:
        wrong = _wrong_kind(path) or (None if skip_broken_shards else _unreadable(path))
        if wrong is not None:
            raise UserError(f"--dataset {printable(path)}: {wrong}")
    # Names are relative to the common folder, so that the ledger stays true when the folder is moved.
    absolute = [os.path.abspath(path) for path in paths]
    base = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return tuple(Shard(printable(os.path.relpath(path, base)), url_of(path)) for path in absolute)


def _wrong_kind(path: str) -> str | None:
    if not ending_of(path):
        suffix = Path(printable(path)).suffix
        return f"cannot read {suffix or 'a file without an ending'}; expected {', '.join(FORMATS)}"
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        return "not a file but a pipe or a device, which cannot be read twice; save what comes out of it as a file"
    return None


def _unreadable(path: str) -> str | None:
    if not os.path.exists(path):
        if os.path.islink(path):
            target = printable(os.readlink(path))
            return f"a link to {target}, which is missing; bring that back, or delete the link"
        return "no such file"
    if not os.access(path, os.R_OK):
        return "no permission to read it"
    try:
        with open(path, "rb") as file:
            start = file.read(sniffing.SNIFFED_BYTES)
    except OSError as error:
        return f"cannot be read ({one_line(error)})"
    return sniffing.not_packed(start, printable(path))
