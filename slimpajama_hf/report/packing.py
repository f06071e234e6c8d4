"""Packs arrays and JSON into one compressed block, small enough for a page.

Layout before gzip: length of the JSON (uint32, little-endian), the JSON in UTF-8, the bytes of the arrays one after the
other. The JSON is `{"meta": ..., "arrays": {name: [type, elements, offset]}}`, with offsets from the end of the JSON.
The bytes of an array are transposed (all first bytes, then all second ones, ...), which halves its compressed size.
`unpack` in assets/data.js reads it.
"""

from __future__ import annotations

import gzip
import json
import struct
from typing import Any

import numpy as np

TYPES = {"u1", "u2", "u4", "i4", "f4"}


def pack(meta: Any, arrays: dict[str, np.ndarray]) -> bytes:
    """Gzip of `meta` (JSON values, no NaN) and one-dimensional arrays of `TYPES`. Equal input gives equal bytes."""
    described: dict[str, tuple[str, int, int]] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        if kind not in TYPES or array.ndim != 1:
            raise ValueError(f"{name}: {array.dtype} of shape {array.shape}; expected one dimension of {sorted(TYPES)}")
        data = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).view(np.uint8)
        part = data.reshape(-1, array.dtype.itemsize).T.tobytes()
        described[name] = (kind, len(array), offset)
        parts.append(part)
        offset += len(part)
    head = json.dumps(
        {"meta": meta, "arrays": described}, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    ).encode("utf-8", "surrogatepass")
    return gzip.compress(b"".join([struct.pack("<I", len(head)), head, *parts]), compresslevel=6, mtime=0)
