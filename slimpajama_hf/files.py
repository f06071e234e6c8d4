"""Files that are written whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable. Does nothing on platforms where folders cannot be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` so that a reader or a crash sees the old file or the new one, nothing between.

    Raises OSError when the disk is full or the folder cannot be written; the old file is then untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # The leading underscore keeps a leftover of a crash out of uploads (huggingface_hub ignores `_*`).
    temporary = path.with_name(f"_{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # A failed write or fsync does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)


#: Flag for `os.open`: fail if the path is a symbolic link, which may lead to somebody else's file.
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_to_append(path: Path) -> Any:
    """Open an unbuffered binary file to append to; make it if it is missing. Raises OSError for a symbolic link."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | NO_LINK, 0o666))


def sync(path: Path) -> None:
    """Force a file to the disk, if it is there."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


def link_or_copy(source: str, target: str) -> None:
    """Link `source` to `target`, or copy it where hard links do not work. Neither may be written to afterwards."""
    try:
        os.link(source, target)
    except OSError:
        # Another file system. A symbolic link would break when the source is moved or deleted.
        shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path, copy: Callable[[str, str], Any] = shutil.copyfile) -> None:
    """Copy a folder and what it holds, each file by `copy`. Raises the OSError of the first file that fails, where
    `shutil.copytree` has an error without a number."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_folder(path, target / path.name, copy)
        else:
            copy(str(path), str(target / path.name))


def looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a file or folder, not as a Hub repository (`name` or
    `owner/name`). Examples are `./z`, `~/z`, `a/b/c`, `x/y.bin`, and `runs/z` if there is a folder `runs`."""
    owner, slash, rest = name.partition("/")
    is_path = name[:1] in (".", "~", "/") or name.endswith("/") or "/" in rest or (os.sep != "/" and os.sep in name)
    # `owner/phi-1.5` is a repository, `x/y.bin` a file.
    is_path = is_path or (bool(slash) and os.path.isdir(owner))
    return is_path or re.search(r"\.[A-Za-z]{2,}$", rest or name) is not None


class GrowingFile:
    """A JSON-lines file that only grows. A line that cannot be written is kept, and written before the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[bytes] = []

    def append(self, value: Any) -> str | None:
        """Add one object as a line. Returns why it could not be written yet, or None."""
        self._pending.append((json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode())
        return self.flush()

    def flush(self) -> str | None:
        """Try to write the lines that were kept. Returns why they cannot be written, or None."""
        data = b"".join(self._pending)
        if not data:
            return None
        try:
            with open_to_append(self.path) as file:
                end = file.tell()
                if file.write(data) != len(data):
                    # Half a line must not stay.
                    file.truncate(end)
                    return os.strerror(errno.ENOSPC)
        except OSError as error:
            return error.strerror or str(error)
        self._pending.clear()
        return None


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write `value` as strict JSON (no NaN) with `write_whole`."""
    write_whole(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent) + "\n")


def refuse_constant(name: str) -> None:
    """Pass this to `json` as `parse_constant`: it raises ValueError, because NaN and Infinity are not JSON."""
    raise ValueError(f"not strict JSON ({name})")


_STRICT = json.JSONDecoder(parse_constant=refuse_constant)


def strict_json(text: str | bytes) -> Any:
    """Parse strict JSON from text or from bytes of UTF-8. Raises ValueError if it is not strict JSON."""
    try:
        return _STRICT.decode(text.decode("utf-8", "surrogatepass") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("too many brackets, one in the other") from None


def read_json(path: Path) -> Any:
    """The JSON of a file, NaN and Infinity included. Raises OSError, and ValueError for what is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("too many brackets, one in the other") from None


def json_lines(path: Path, passed_over: list[str] | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (line, its object) for each line of a file of JSON objects; nothing if there is no file. Lines without an
    object are skipped and named in `passed_over`. A last line without its end is skipped silently."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                yield line, value
            elif passed_over is not None:
                passed_over.append(f"line {number:,} of {path.name}")
