"""Tell from its first bytes that a file is not what its name says."""

from __future__ import annotations

import codecs
import re

#: How many first bytes `mistaken` looks at.
SNIFFED_BYTES = 512

_COMPRESSED = {b"\x1f\x8b": ("gzip-compressed", ".gz"), b"\x28\xb5\x2f\xfd": ("zstd-compressed", ".zst")}
_OTHERS = {
    b"BZh": "compressed with bzip2; unpack it: bunzip2",
    b"\xfd7zXZ\0": "compressed with xz; unpack it: unxz",
    b"\x04\x22\x4d\x18": "compressed with lz4; unpack it: unlz4",
    b"PK\x03\x04": "a ZIP archive; unpack it: unzip",
    b"PAR1": "a parquet file; let its name end in .parquet",
    b"ARROW1": "an Arrow file; save it as parquet: datasets.Dataset.from_file(FILE).to_parquet(NEW)",
    b"%PDF-": "a PDF file; save its text: pdftotext",
    b"SQLite format 3\0": "an SQLite database; save its text as JSON lines",
}
#: UTF-32 comes first, because its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def not_a_download(start: bytes) -> str | None:
    """What a failed download often leaves in place of a file, and what to do; None if it is none of these."""
    start = start.removeprefix(codecs.BOM_UTF8).lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: git lfs pull fetches that"
    if re.match(rb"<!doctype html|<html\b|<\?xml[^>]*>\s*(<!doctype html|<html\b|<error>)", start):
        return "it is an HTML page, as a server sends in place of a file: download it again"
    return None


def not_packed(start: bytes, name: str) -> str | None:
    """Why the first bytes of a file do not fit the compression (or parquet) that its name says; None: they fit."""
    lower = name.lower()
    for magic, ending in ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst"), (b"PAR1", ".parquet")):
        if lower.endswith(ending):
            skippable = ending == ".zst" and re.match(rb"[\x50-\x5f]\x2a\x4d\x18", start)
            # An empty file was cut short. The reader says so.
            if start.startswith(magic) or skippable or not start:
                return None
            return not_a_download(start) or _is_text(start, name, ending) or mistaken(start, name, packed=True)
    return mistaken(start, name)


def _is_text(start: bytes, name: str, ending: str) -> str | None:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return None
    if any(ord(character) < 32 and not character.isspace() for character in text):
        return None
    plain = name[: -len(ending)] if ending != ".parquet" else name[: -len(ending)] + ".jsonl"
    return f"it is plain text, and its name says {ending}; rename it: {plain}"


def mistaken(start: bytes, name: str, packed: bool = False) -> str | None:
    """What a text file really is, if its first bytes show it, and what to type; None: nothing odd is seen.

    `packed`: look only for compressions other than that of the name, not at the text.
    """
    for magic, (what, ending) in _COMPRESSED.items():
        if start.startswith(magic):
            return f"it is {what}, and its name does not say so; rename it: {_unpacked_name(name)}{ending}"
    for magic, words in _OTHERS.items():
        if start.startswith(magic):
            return f"it is {words}"
    if packed:
        return None
    found = not_a_download(start) or _of_another_encoding(start)
    if found is not None or "json" not in name.lower().rpartition("/")[2]:
        return found
    if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", start):
        return f"it is one JSON array, not one record a line; make lines of it: jq -c '.[]' {name} > new.jsonl"
    if len(start) < SNIFFED_BYTES and re.fullmatch(rb"[^\s{}\[\]\"]*/[^\s{}\[\]\"]*", start):
        # Git writes a link like this on file systems without links.
        path = start.decode("utf-8", "backslashreplace")
        return f"it is a link that was copied as text: the file that it names, {path}, is missing; bring that here"
    return None


def _unpacked_name(name: str) -> str:
    return re.sub(r"\.(gz|zst|parquet)$", "", name, flags=re.IGNORECASE)


def _of_another_encoding(start: bytes) -> str | None:
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if encoding is None and len(start) >= 4:
        # Without a mark: in Latin text every second byte (UTF-16), or all but every fourth (UTF-32), is zero.
        pairs = start[: len(start) // 4 * 4]
        zeros = [pairs[place::4].count(0) * 4 > len(pairs) * 0.6 for place in range(4)]
        encoding = {
            (False, True, False, True): "UTF-16LE",
            (True, False, True, False): "UTF-16BE",
            (False, True, True, True): "UTF-32LE",
            (True, True, True, False): "UTF-32BE",
        }.get((zeros[0], zeros[1], zeros[2], zeros[3]))
    if encoding is None:
        return None
    return f"not UTF-8 ({encoding}); convert it: iconv -f {encoding} -t UTF-8 FILE > NEW"
