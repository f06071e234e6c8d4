"""Whether this user's own run made a folder, and nobody else has changed it since.

A run folder may be somebody else's: downloaded, unpacked, or left in a shared place. What it says about the numbers of
the run is trusted. Where to push, what to read and what to write are trusted only if the folder has this program's
mark: a keyed hash of its configuration and its corpus. The key is this user's and never leaves this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

from slimpajama_hf import files
from slimpajama_hf.record.run_folder import MARK, RunFolder


def key_file() -> Path:
    """The path of the key: `$XDG_STATE_HOME/slimpajama_hf/key`, usually under `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "slimpajama_hf" / "key"


def _key() -> bytes | None:
    """The key, made at the first run; None if it can neither be read nor made."""
    path = key_file()
    with contextlib.suppress(OSError, RuntimeError):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Linked into place when complete, and never over the key of another process.
            made = path.with_name(f"key.{os.getpid()}")
            descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):
                os.link(made, path)
            made.unlink()
        key = path.read_bytes()
        return key if len(key) == 32 else None
    return None


def _mark(folder: RunFolder, key: bytes) -> str | None:
    try:
        record = json.loads(folder.record.read_bytes())
        said = json.dumps([record["run_id"], record["corpus"], record["tokenizer"]], sort_keys=True)
        config = folder.config.read_bytes() if folder.config.is_file() else b""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    # The length separates the two parts.
    content = b"%d\n%s%s" % (len(said), said.encode("utf-8", "surrogatepass"), config)
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def sign(folder: RunFolder) -> None:
    """Mark a run folder as this user's. Without a place for a key, nothing is marked."""
    key = _key()
    mark = _mark(folder, key) if key is not None else None
    if mark is not None:
        files.write_whole(folder.path / MARK, mark + "\n")


def is_own(folder: RunFolder) -> bool:
    """Whether the folder is as this user's run left it on this machine."""
    key = _key()
    mark = _mark(folder, key) if key is not None else None
    if mark is None:
        return False
    try:
        found = (folder.path / MARK).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return False
    return hmac.compare_digest(found.encode(), mark.encode())
