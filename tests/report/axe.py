"""axe-core, which knows the rules of accessible pages: fetched from npm into a cache when a test asks for it.

`python -m tests.report.axe` fetches it ahead; what a machine with neither npm nor the cache cannot do is said in words.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "4.11.0"
SHA256 = "39bed7d72308f6d620789c169d699bfd7e8da80f65b545821a6b2215c3e83107"  # of the tarball at the registry
SECONDS = 60


class NotHereError(Exception):
    """Why there is no axe-core on this machine, in a sentence."""


def script() -> str:
    """The source of axe-core. Raises NotHereError where it is not cached and cannot be fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimpajama_hf_tests"
    path = cache / f"axe-core-{VERSION}.min.js"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fetched = Path(folder) / path.name
            fetched.write_bytes(_fetch(Path(folder)))
            os.replace(fetched, path)
    return path.read_text(encoding="utf-8")


def _fetch(folder: Path) -> bytes:
    npm = shutil.which("npm")
    if npm is None:
        raise NotHereError("no npm on this machine to fetch axe-core with: apt-get install npm")
    command = [npm, "pack", "--silent", f"axe-core@{VERSION}", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise NotHereError(f"npm fetched no axe-core {VERSION} within {SECONDS} seconds") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[0]
        raise NotHereError(f"npm could not fetch axe-core {VERSION}: {said}")
    tarball = folder / f"axe-core-{VERSION}.tgz"
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    assert found == SHA256, f"axe-core {VERSION} from npm has the SHA-256 {found}; expected {SHA256}"
    with tarfile.open(tarball) as opened:
        member = opened.extractfile("package/axe.min.js")
        assert member is not None
        return member.read()


if __name__ == "__main__":
    try:
        script()
    except NotHereError as error:
        sys.exit(f"the report is not looked at by axe: {error}")
