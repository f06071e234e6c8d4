"""Files that are written whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable. Folders cannot be synced on every platform: then nothing happens."""
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
        # Of what did not get through, Python does not say the name.
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)


#: For `os.open`: fail where the path is a link by name, which may lead to anybody's file.
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_to_append(path: Path) -> Any:
    """A binary file without a buffer to add to, made if it is not there. Raises OSError where the path is a link."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | NO_LINK, 0o666))


def sync(path: Path) -> None:
    """Force a file to the disk, if it is there."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        os.fsync(file.fileno())


def link_or_copy(source: str, target: str) -> None:
    """The same file in another place, without its bytes a second time where that can be. It is not to be written to."""
    try:
        os.link(source, target)
    except OSError:
        # Another file system. A link by name would break when the other file is moved or deleted.
        shutil.copyfile(source, target)


def looks_local(name: str) -> bool:
    """Whether a name that is nothing here was meant for a file or a folder, and not for a repository of the Hub (`name`
    or `owner/name`): `./z`, `~/z`, `a/b/c`, `x/y.bin`, or `runs/z` where there is a folder `runs`."""
    owner, slash, rest = name.partition("/")
    is_path = name[:1] in (".", "~", "/") or name.endswith("/") or "/" in rest or (os.sep != "/" and os.sep in name)
    # `owner/phi-1.5` is a repository, `x/y.bin` a file.
    is_path = is_path or (bool(slash) and os.path.isdir(owner))
    return is_path or re.search(r"\.[A-Za-z]{2,}$", rest or name) is not None


class GrowingFile:
    """A JSON-lines file that only grows; what the disk does not take is kept and written before the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[bytes] = []

    def append(self, value: Any) -> str | None:
        """Add one object as a line; why it could not be written yet, or None."""
        self._pending.append((json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode())
        return self.flush()

    def flush(self) -> str | None:
        """Try to write what is pending; why it cannot be written, or None."""
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
    """For `json`'s `parse_constant`: NaN and Infinity are no JSON."""
    raise ValueError(f"not strict JSON ({name})")


_STRICT = json.JSONDecoder(parse_constant=refuse_constant)


def strict_json(text: str | bytes) -> Any:
    """The value of a text of strict JSON, in bytes of UTF-8. Raises ValueError where it is none."""
    try:
        return _STRICT.decode(text.decode("utf-8", "surrogatepass") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("too many brackets, one in the other") from None


def json_lines(path: Path, passed_over: list[str] | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, its object) of a file of JSON objects, none where there is no file. Lines that hold none are passed over
    and named in `passed_over`; a torn last one is passed over without a word."""
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
