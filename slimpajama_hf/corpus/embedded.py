"""The embedded corpus: real text that every Python installation holds, in the record shape of SlimPajama.

The documents are cut from the standard library of the running interpreter (its `.py` sources, without tests) and from
the language reference in `pydoc`. Nothing is downloaded. The text has the PSF licence that came with the interpreter.

One record is `{"text": str, "meta": {"redpajama_set_name": str}}`. The domains have names of our own (`DOMAINS`),
because this is not SlimPajama and must not look like it in a chart.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import textwrap
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from slimpajama_hf.errors import UserError
from slimpajama_hf.files import sync_folder

DOMAINS = ("PythonFunction", "PythonClass", "PythonDocstring", "PythonTopic")
TRAIN, VALIDATION = "train.jsonl.zst", "validation.jsonl.zst"

# Part of the folder's name. Raise it when the same sources would give other documents or another order.
_VERSION = "v1"
# Folders left out, because some distributions lack them or keep other packages in them.
_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"})
# Fewest characters of a document. Shorter texts are mostly one-line wrappers that differ in one name.
_SHORTEST = {"PythonFunction": 80, "PythonClass": 80, "PythonDocstring": 60, "PythonTopic": 80}
# Characters of a topic section after which the next paragraph starts a new document.
_TOPIC_SECTION = 1000
_VALIDATION_PERCENT = 2
# A standard library has some 650 sources. With fewer than this it was stripped, or lies in a zip file.
_FEWEST_SOURCES = 100
_SAY_EVERY_SECONDS = 0.5
# A build takes seconds, so a temporary folder older than this was left by a process that died.
_STALE_SECONDS = 3600.0


class Text(NamedTuple):
    """One document of the corpus: its text, NFC, and the name of its domain (one of `DOMAINS`)."""

    text: str
    domain: str


def default_cache() -> Path:
    """Where built corpora are kept: `$SLIMPAJAMA_HF_CACHE`, else `$XDG_CACHE_HOME/slimpajama_hf`, else `~/.cache/...`.

    Variables that are set but empty count as not set (XDG Base Directory Specification).
    """
    own = os.environ.get("SLIMPAJAMA_HF_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "slimpajama_hf"


def build(cache: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder that holds `train.jsonl.zst` and `validation.jsonl.zst`. Build it if it is not there.

    The folder is named after the interpreter's version and its sources, so that another Python gets another folder. It
    appears whole or not at all; if two processes build it at once, that of the first stays. Each document is in one of
    the files, once; 2 in 100 are for validation. The same sources give the same bytes. `say` gets a line at least every
    second.

    Raises UserError when this Python holds no sources or when `cache` cannot be written.
    """
    library = _standard_library()
    sources = _sources(library)
    folder = cache / _folder_name(library, sources)
    if _is_whole(folder):
        return folder
    # Made before the sources are read, which takes seconds: a cache that cannot be written fails at once.
    temporary = _temporary_folder(cache)
    try:
        say(f"building the embedded corpus from {len(sources)} modules of the standard library in {library}")
        records = _distinct(_documents(library, sources, say))
        try:
            for name, part in ((TRAIN, False), (VALIDATION, True)):
                lines = [record for record, is_validation in records if is_validation is part]
                say(f"writing {name}: {len(lines)} documents")
                _write_zst(temporary / name, lines)
            # mkdtemp makes it private, but users may share a cache.
            temporary.chmod(0o755)
            sync_folder(temporary)
            _move_into_place(temporary, folder)
        except OSError as error:
            raise _not_writable(cache, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _temporary_folder(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        # The leading underscore keeps a leftover of a crash apart from whole corpora.
        return Path(tempfile.mkdtemp(prefix="_embedded-", dir=cache))
    except OSError as error:
        raise _not_writable(cache, error) from error


def _not_writable(cache: Path, error: OSError) -> UserError:
    return UserError(
        f"the embedded corpus cannot be written to {cache} ({error.strerror or error}); expected a folder that can"
        " be written with 20 MB free: set SLIMPAJAMA_HF_CACHE=/some/other/folder and start again"
    )


def _standard_library() -> Path:
    """Return the folder of this interpreter's pure-Python standard library. Raises UserError if there is none."""
    library = Path(sysconfig.get_path("stdlib"))
    if library.is_dir():
        return library
    raise UserError(
        f"this Python keeps its standard library in {library}, which is not a folder; the embedded corpus is cut from"
        " the library's .py files: use another Python, or name your own text with --dataset PATH"
    )


def _sources(library: Path) -> list[tuple[str, int]]:
    """Relative path (with `/`) and size in bytes of each source that is used, sorted by path."""
    found = []
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith("config-"))
        for name in names:
            # _sysconfigdata*.py names folders of the machine that built this Python.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                found.append((path.relative_to(library).as_posix(), path.stat().st_size))
    if len(found) < _FEWEST_SOURCES:
        raise UserError(
            f"{library} holds {len(found)} .py files, a whole standard library has more than {_FEWEST_SOURCES}; the"
            " embedded corpus is cut from them: use a Python with sources, or name your own text with --dataset PATH"
        )
    return sorted(found)


def _folder_name(library: Path, sources: list[tuple[str, int]]) -> str:
    """Name of the corpus's folder: our version, Python's version, a digest of the sources' paths and sizes."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    digest = hashlib.sha1("".join(f"{path} {size}\n" for path, size in sources).encode()).hexdigest()
    return f"embedded-{_VERSION}-py{version}-{digest[:8]}"


def _is_whole(folder: Path) -> bool:
    return (folder / TRAIN).is_file() and (folder / VALIDATION).is_file()


def _move_into_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`. If another process was faster, its folder stays."""
    if folder.exists() and not _is_whole(folder):
        # Somebody deleted one of the files. A rename cannot replace a folder that is not empty.
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not _is_whole(folder):
            raise
    else:
        sync_folder(folder.parent)


def _remove_stale(cache: Path) -> None:
    """Delete temporary folders that dead processes left in `cache`."""
    for leftover in cache.glob("_embedded-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _write_zst(path: Path, lines: list[str]) -> None:
    """Write JSON lines as one zstd frame, synced to disk."""
    from backports import zstd

    # Compressed in one call, so that the frame has size and checksum, and a reader notices a file that was cut short.
    data = zstd.compress("".join(lines).encode("utf-8"), options={zstd.CompressionParameter.checksum_flag: 1})
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _distinct(documents: Iterator[Text]) -> list[tuple[str, bool]]:
    """Return (JSON line, whether it is for validation) of each distinct document, in the order of the corpus.

    Documents are sorted by the SHA-1 of their text: a shuffle that is the same everywhere. The part depends on the text
    alone, so that a text never moves to the other part when the sources around it change.
    """
    records: dict[bytes, tuple[str, bool]] = {}
    for text, domain in documents:
        if len(text) < _SHORTEST[domain]:
            continue
        digest = hashlib.sha1(text.encode("utf-8")).digest()
        if digest not in records:
            record = {"text": text, "meta": {"redpajama_set_name": domain}}
            # The last bytes decide. The first ones make the order, and validation must not be one end of it.
            part = int.from_bytes(digest[-4:], "big") % 100 < _VALIDATION_PERCENT
            records[digest] = (json.dumps(record, ensure_ascii=False) + "\n", part)
    return [records[digest] for digest in sorted(records)]


def _documents(library: Path, sources: list[tuple[str, int]], say: Callable[[str], None]) -> Iterator[Text]:
    """Yield every document, repeated ones too, in the order of the sources. Cleaned, not yet filtered by length."""
    said = time.monotonic()
    for number, (name, _) in enumerate(sources):
        now = time.monotonic()
        if now - said > _SAY_EVERY_SECONDS:
            said = now
            say(f"reading the standard library: {number} of {len(sources)} modules")
        path = library / name
        pieces = _topics(path) if name == "pydoc_data/topics.py" else _module(path.read_bytes())
        for text, domain in pieces:
            yield Text(_clean(text), domain)


def _clean(text: str) -> str:
    """Normalize to NFC and Unix line ends. Drop spaces before line ends, empty lines around, and lone surrogates."""
    text = text.encode("utf-8", "ignore").decode("utf-8")
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t\f]+\n", "\n", text)
    return text.strip("\n").rstrip()


def _module(source: bytes) -> Iterator[Text]:
    """Yield the documents of one module: its functions, classes and docstrings. None if the source cannot be parsed.

    A few sources of the library are broken on purpose (bad encodings, old syntax) and give nothing.
    """
    try:
        with warnings.catch_warnings():
            # The user can do nothing about invalid escapes in old modules of the library.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        # Decoded as the source's own coding line says, and split as the parser splits: at \n alone, not at form feeds.
        text = importlib.util.decode_source(source)
    except (SyntaxError, ValueError, UnicodeDecodeError):
        return
    lines = io.StringIO(text, newline="\n").readlines()
    yield from _docstring(tree)
    yield from _definitions(tree.body, lines)


def _definitions(body: list[ast.stmt], lines: list[str]) -> Iterator[Text]:
    """Yield documents of the functions and classes in `body`, also below `if` and `try`, but not inside functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Text(_without_docstring(node, lines), "PythonFunction")
            yield from _docstring(node)
        elif isinstance(node, ast.ClassDef):
            yield Text(_outline(node, lines), "PythonClass")
            yield from _definitions(node.body, lines)
        else:
            for block in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, block, []), lines)
            for handler in getattr(node, "handlers", []):
                yield from _definitions(handler.body, lines)


def _docstring(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Text]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield Text(docstring, "PythonDocstring")


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Number (from 1) of the first line of a definition or of its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Dedented source of a function without its docstring, which is a document of its own."""
    start, end = _first_line(node), node.end_lineno or node.lineno
    first = node.body[0]
    # A docstring can be cut out line by line only if it shares no line with code (not `def f(): "text"`).
    if _is_docstring(first) and len(node.body) > 1 and first.lineno > node.lineno and first.end_lineno:
        if node.body[1].lineno > first.end_lineno:
            kept = lines[start - 1 : first.lineno - 1] + lines[first.end_lineno : end]
            return textwrap.dedent("".join(kept))
    elif _is_docstring(first) and len(node.body) == 1:
        return ""  # The function is only a docstring, so there is no second document.
    return textwrap.dedent("".join(lines[start - 1 : end]))


def _outline(node: ast.ClassDef, lines: list[str]) -> str:
    """Source of a class with `...` for the bodies of its methods, like a help() page that is code.

    Methods and inner classes are documents of their own and are not repeated here.
    """
    kept = lines[_first_line(node) - 1 : node.body[0].lineno - 1]
    for statement in node.body:
        start, end = statement.lineno, statement.end_lineno or statement.lineno
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            head = lines[_first_line(statement) - 1 : max(statement.body[0].lineno - 1, statement.lineno)]
            if statement.body[0].lineno > statement.lineno:
                # Comments between head and first statement belong to the body.
                while len(head) > 1 and not head[-1].split("#")[0].strip():
                    head.pop()
                indent = " " * (statement.col_offset + 4)
                kept += [*head, f"{indent}...\n"]
            else:
                kept += head  # A body on the line of `def` is short.
        elif isinstance(statement, ast.ClassDef):
            kept.append(f"{' ' * statement.col_offset}class {statement.name}: ...\n")
        else:
            kept += lines[start - 1 : end]
    return textwrap.dedent("".join(kept))


def _topics(path: Path) -> Iterator[Text]:
    """Yield sections of the language reference that `help("topic")` shows: whole paragraphs, about 1000 characters.

    `path` is a file of the same library as everything else. It holds one dictionary literal.
    """
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for title in sorted(topics):
                for section in _sections(topics[title]):
                    yield Text(section, "PythonTopic")


def _sections(topic: str) -> Iterator[str]:
    """Cut a topic between paragraphs. A section ends when it has `_TOPIC_SECTION` characters, or before a heading."""
    sections: list[str] = []
    for paragraph in re.split(r"\n\s*\n", topic):
        underlined = re.search(r"^[*=\-~^]{4,}$", paragraph, re.MULTILINE) is not None
        # A heading starts a section. An indented paragraph (code, a list) belongs to the one before it.
        if sections and not underlined and (len(sections[-1]) < _TOPIC_SECTION or paragraph.startswith("   ")):
            sections[-1] += "\n\n" + paragraph
        else:
            sections.append(paragraph)
    return iter(sections)
