"""Files as people have them, made from a seed: odd encodings, schemas, compressions, cut points and names."""

from __future__ import annotations

import bz2
import dataclasses
import datetime
import gzip
import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

from tests.conftest import make_text

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0123" * 16 + b"\nsize 123456789\n"
_NAMES = ("plain", "with space", "br[a]ck", "UPPER", "new\nline", "größe", b"caf\xe9", "-dash", "a.b.c")


@dataclasses.dataclass
class Odd:
    """What was made: a file or a folder with it, and how many records it has if it can be read to its end."""

    path: str
    written: int
    texts: list[str]
    kind: str
    name: str
    """The beginning of the file's name."""


def compressed(data: bytes, ending: str) -> bytes:
    """`data` as the ending asks for."""
    from backports import zstd

    if ending.endswith(".gz"):
        return gzip.compress(data)
    return zstd.compress(data) if ending.endswith(".zst") else data


def _records(draw: random.Random) -> list[dict[str, Any]]:
    """Records, some of them odd."""
    found: list[dict[str, Any]] = []
    for number in range(draw.randint(1, 40)):
        record: dict[str, Any] = {"text": make_text(draw.randrange(10**6), draw.choice([3, 20, 200])) + " é 漢"}
        odd = draw.random()
        if odd < 0.1:
            record["text"] = draw.choice([None, 3, ["a"], "", "  ", "cut \ud83d", {"a": 1}, True])
        elif odd < 0.2:
            record = {draw.choice(["content", "Text", "body \ud800"]): record["text"], "id": number}
        record[draw.choice(["source", "domain", "other"])] = draw.choice(
            ["web", "\ud83d cut", None, 5, {"a": [1]}, "x" * 300, "\x1b[31m", "two\nlines"]
        )
        if draw.random() < 0.3:
            record["meta"] = draw.choice([{"source": "m\udfff"}, "{[]: 1}", "[" * 5000, "{'a': 1}", 7, [None]])
        found.append(record)
    return found


def _json_lines(draw: random.Random) -> tuple[bytes, list[str]]:
    records = _records(draw)
    lines = [json.dumps(record, ensure_ascii=draw.random() < 0.5) for record in records]
    data = [line.encode("utf-8", "surrogatepass") for line in lines]
    for _ in range(draw.choice([0, 0, 1, 3])):
        data.insert(
            draw.randint(0, len(data)),
            draw.choice([b"", b"not json", b'{"text": "caf\xe9"}', b'"a string"', b"[1, 2]", b'{"text": "cu', b"\0\0"]),
        )
    end = draw.choice([b"\n", b"\n", b"\r\n"])
    texts = [record["text"] for record in records if isinstance(record.get("text"), str)]
    return end.join(data) + draw.choice([b"", end]), texts


def _count(data: bytes) -> int:
    """Lines of a file: what follows the last newline is one if it is there."""
    return data.count(b"\n") + (not data.endswith(b"\n") and data != b"")


def _text_lines(draw: random.Random) -> tuple[bytes, list[str]]:
    lines = [make_text(draw.randrange(10**6), draw.choice([2, 30])) for _ in range(draw.randint(1, 30))]
    data = [line.encode() for line in lines]
    for _ in range(draw.choice([0, 1, 2])):
        data.insert(draw.randint(0, len(data)), draw.choice([b"", b"   ", b"caf\xe9 bytes"]))
    return b"\n".join(data), lines


def _parquet(draw: random.Random, path: bytes) -> tuple[int, list[str]]:
    import pyarrow
    from pyarrow import parquet

    count = draw.randint(1, 150)
    texts = [make_text(draw.randrange(10**6), 12) for _ in range(count)]
    data: list[bytes | None] = [text.encode() for text in texts]
    for place in draw.sample(range(count), min(count, draw.choice([0, 1, 3]))):
        data[place] = draw.choice([b"caf\xe9", None, b"", b"\xff\xfe"])
    kind = draw.choice(["string", "large_string", "binary", "large_binary", "dictionary"])
    if kind == "dictionary":
        column = pyarrow.array(data, pyarrow.binary()).view(pyarrow.string()).dictionary_encode()
    else:
        column = pyarrow.array(data, pyarrow.large_binary() if kind.startswith("large") else pyarrow.binary())
        column = column.view(getattr(pyarrow, kind)())
    columns = {draw.choice(["text"] * 9 + ["content"]): column}
    beside = draw.choice(["none", "far", "bad", "struct", "map", "list", "json"])
    if beside == "far":
        columns["meta"] = pyarrow.StructArray.from_arrays(
            [pyarrow.array([2**62] * count, pyarrow.timestamp("us"))], ["timestamp"]
        )
    elif beside == "bad":
        columns["source"] = pyarrow.array([b"caf\xe9"] * count).view(pyarrow.string())
    elif beside == "struct":
        columns["meta"] = pyarrow.array([{"source": "web", "at": datetime.date(1, 1, 1)}] * count)
    elif beside == "map":
        columns["meta"] = pyarrow.array([[("a", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    elif beside == "list":
        columns["source"] = pyarrow.array([["a", "b"]] * count)
    elif beside == "json":
        columns["meta"] = pyarrow.array(['{"source": "web"}'] * count)
    with open(path, "wb") as file:
        parquet.write_table(pyarrow.table(columns), file, row_group_size=draw.choice([7, 64, 1000]))
    return count, texts


def make(seed: int, folder: Path) -> Odd:
    """One odd input of that seed, in a folder of its own."""
    draw = random.Random(seed)
    here = folder / str(seed)
    here.mkdir(parents=True)
    name = draw.choice(_NAMES)
    stem = name if isinstance(name, bytes) else name.encode()
    kind = draw.choice(["json", "json", "text", "parquet", "encoding", "wrong name", "cut", "garbage", "parts"])
    ending = draw.choice([".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst"])
    if kind == "parquet":
        path = os.path.join(os.fsencode(here), stem + b".parquet")
        written, texts = _parquet(draw, path)
        if draw.random() < 0.3:
            data = Path(os.fsdecode(path)).read_bytes()
            cut = draw.randrange(len(data))
            Path(os.fsdecode(path)).write_bytes(draw.choice([data[:cut], data[:cut] + b"\xff" + data[cut + 1 :]]))
            kind = "parquet cut"
        return Odd(os.fsdecode(path) if draw.random() < 0.7 else str(here), written, texts, kind, stem[:2].decode())
    if kind == "text":
        ending = draw.choice([".txt", ".txt.gz", ".txt.zst"])
        data, texts = _text_lines(draw)
        written = sum(bool(line.strip()) for line in data.split(b"\n"))
        content = compressed(data, ending)
    else:
        data, texts = _json_lines(draw)
        written = _count(data)
        content = compressed(data, ending)
    if kind == "encoding":
        how = draw.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
        text = data.decode("utf-8", "replace").replace("\0", "")
        content = compressed(text.encode(how, "replace"), ending)
        written = _count(text.encode(how, "replace"))
    elif kind == "wrong name":
        ending = draw.choice([".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
        whole = [gzip.compress(data), compressed(data, ".zst"), bz2.compress(data), lzma.compress(data), LFS_POINTER,
                 b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04 zip", b"%PDF-1.4", b"\0\1\2 nothing"]  # fmt: skip
        content, texts = draw.choice(whole), [*texts, "\0\1\2 nothing"]
        written = 1 if content == whole[-1] else written
    elif kind == "cut":
        content = content[: draw.randrange(1, len(content))]
        written = _count(content) if ending in (".jsonl", ".ndjson") else written
    elif kind == "garbage":
        content += draw.choice([b"garbage behind it", b"\0" * 600, b"\xff\xd8\xff"])
        written = _count(content) if ending in (".jsonl", ".ndjson") else written
    elif kind == "parts" and ending not in (".jsonl", ".ndjson"):
        head, tail = data[: len(data) // 2], data[len(data) // 2 :]
        between = b"\x50\x2a\x4d\x18\x04\0\0\0skip" if ending.endswith(".zst") else b"\0" * draw.choice([0, 512])
        content = compressed(head, ending) + between + compressed(tail, ending)
    if draw.random() < 0.2:
        ending = ending.upper()
    path = os.path.join(os.fsencode(here), stem + ending.encode())
    with open(path, "wb") as file:
        file.write(content)
    return Odd(
        os.fsdecode(path) if draw.random() < 0.7 else str(here), written, texts, f"{kind} {ending}", stem[:2].decode()
    )
