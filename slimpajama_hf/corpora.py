"""Where text comes from: mirrors of SlimPajama, the embedded corpus, local files, any Hub dataset.

Each becomes a `Corpus`: shards in a fixed order and records inside them, read as a stream of `Document`s. The place of
a document (mirror, shard, row) rides with it, so reading can start again at any row without a look at earlier shards.

To add a corpus: a row in `CORPORA`. To add a file format: a row in `FORMATS` and a reader.
"""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import gzip
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from slimpajama_hf.errors import UserError

if TYPE_CHECKING:
    import datasets

#: Seconds that all mirrors together may take to open before the program gives up (the promise is 30 s on screen).
OPENING_SECONDS = 20.0

#: A longer line is passed over without being held in memory. The longest documents of SlimPajama are books of some MB.
LONGEST_LINE_BYTES = 32 * 2**20

DOMAIN_KEYS = ("redpajama_set_name", "domain", "pile_set_name", "source", "subset")
UNKNOWN_DOMAIN = "unknown"


@dataclasses.dataclass(frozen=True)
class Mirror:
    """One copy of a corpus on the Hub, pinned; its files are listed folder by folder, as they are reached."""

    repo: str
    revision: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    """Prefixes of files, in reading order: `data/train-` is every file of `data` whose name starts with `train-`."""

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision[:12]}"


#: Revisions and layouts: the dataset pages and the projects that pin them (see docs/data.md).
_ORIGINAL = Mirror(
    "cerebras/SlimPajama-627B",
    "2d0accdd58c5d5511943ca1f5ff0e3eb5e293543",
    train=tuple(f"train/chunk{n}/" for n in range(1, 11)),
    validation=tuple(f"validation/chunk{n}/" for n in range(1, 6)),
)
_REUPLOAD = Mirror(
    "gmongaras/SlimPajama-627B_Reupload", "c34c22dbb10ae6b264a2f357a909d1a537141b36", ("data/train-",), ("data/test-",)
)
_SIX_BILLION = Mirror(
    "DKYoon/SlimPajama-6B", "b5f90f419b7489cdba26fdbc8c022fcb5562f968", ("data/train-",), ("data/validation-",)
)

#: `--dataset NAME`: mirrors of the same corpus, tried in this order.
CORPORA: dict[str, tuple[Mirror, ...]] = {
    "slimpajama": (_ORIGINAL, _REUPLOAD, _SIX_BILLION),
    "slimpajama_627b": (_ORIGINAL,),
    "slimpajama_627b_reupload": (_REUPLOAD,),
    "slimpajama_6b": (_SIX_BILLION,),
}

#: What to type when there is no Hub.
OFFLINE_COMMAND = "accelerate launch run_clm_slimpajama.py --dataset embedded --model tiny --tokenizer builtin"


@dataclasses.dataclass(frozen=True)
class Cursor:
    """A place in a corpus: what is read next. `row` counts records of `shard` from 0, `token` tokens of that record."""

    epoch: int = 0
    shard: str | None = None
    """None: the first shard."""
    row: int = 0
    token: int = 0


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file. `name` is what the ledger records; `url` is what is opened (`hf://...` or a local path)."""

    name: str
    url: str


@dataclasses.dataclass(frozen=True)
class Document:
    """One record of the corpus."""

    text: str
    domain: str
    mirror: str
    shard: str
    row: int
    sha1: str
    size: int
    """UTF-8 bytes of the whole text."""


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A record that cannot be trained on, and why."""

    reason: str
    shard: str
    row: int


# ---- records -------------------------------------------------------------------------------------------------------


def domain_of(record: dict[str, Any]) -> str:
    """The domain in a record's `meta`, which is a dict, a JSON string or the repr of a Python dict, by mirror."""
    meta = record.get("meta")
    if isinstance(meta, str) and len(meta) < 10_000:
        try:
            meta = json.loads(meta)
        except ValueError:
            try:
                meta = ast.literal_eval(meta)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                meta = None
    for place in (meta, record):
        if isinstance(place, dict):
            for key in DOMAIN_KEYS:
                if isinstance(place.get(key), str) and place[key]:
                    return place[key]
    return UNKNOWN_DOMAIN


def to_document(record: Any, text_column: str, mirror: str, shard: str, row: int) -> Document | Unusable:
    """A record as a document, or the reason why it is none. The tokenizer may still find it too short."""
    if not isinstance(record, dict):
        return Unusable("not a record", shard, row)
    if text_column not in record:
        return Unusable(f"no {text_column!r}", shard, row)
    text = record[text_column]
    if not isinstance(text, str):
        return Unusable("text is null" if text is None else f"text is a {type(text).__name__}", shard, row)
    if not text:
        return Unusable("empty", shard, row)
    if text.isspace():
        return Unusable("blank", shard, row)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return Unusable("lone surrogate", shard, row)
    return Document(text, domain_of(record), mirror, shard, row, hashlib.sha1(data).hexdigest(), len(data))


# ---- files ---------------------------------------------------------------------------------------------------------


def open_raw(url: str) -> IO[bytes]:
    """The bytes of a local path or of a file on the Hub (`hf://datasets/...`, fetched range by range)."""
    if url.startswith("hf://"):
        from slimpajama_hf.hub_files import open_on_hub

        return open_on_hub(url)
    return open(url, "rb")


def decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    """`raw` behind the decompression that its name asks for. Both readers raise EOFError on a truncated file."""
    if name.endswith(".zst"):
        from backports import zstd

        return cast("IO[bytes]", zstd.ZstdFile(raw))
    if name.endswith(".gz"):
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    return raw


def lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines without their newline; None stands for one that is longer than `LONGEST_LINE_BYTES` (never held whole)."""
    pending: list[bytes] = []
    size = 0
    while chunk := file.read(2**18):
        first, *more = chunk.split(b"\n")
        size += len(first)
        if size <= LONGEST_LINE_BYTES:
            pending.append(first)
        else:
            pending.clear()
        for piece in more:
            yield b"".join(pending) if size <= LONGEST_LINE_BYTES else None
            pending, size = [piece], len(piece)
    if size:
        yield b"".join(pending) if size <= LONGEST_LINE_BYTES else None


def read_json_lines(file: IO[bytes], start: int, text_column: str) -> Iterator[tuple[int, Any]]:
    """(row, record) from row `start`; a record is a value, or Unusable's reason as a string."""
    for row, line in enumerate(lines(file)):
        if row < start:
            continue
        if line is None:
            yield row, f"longer than {LONGEST_LINE_BYTES // 2**20} MB"
            continue
        try:
            yield row, json.loads(line)
        except UnicodeDecodeError:
            yield row, "not UTF-8"
        except (ValueError, RecursionError):
            yield row, "not JSON" if line.strip() else "empty line"


def read_text_lines(file: IO[bytes], start: int, text_column: str) -> Iterator[tuple[int, Any]]:
    """A plain text file: one document a line; empty lines only separate."""
    for row, line in enumerate(lines(file)):
        if row < start or (line is not None and not line.strip()):
            continue
        if line is None:
            yield row, f"longer than {LONGEST_LINE_BYTES // 2**20} MB"
            continue
        try:
            yield row, {text_column: line.decode("utf-8").rstrip("\r")}
        except UnicodeDecodeError:
            yield row, "not UTF-8"


def read_parquet(file: IO[bytes], start: int, text_column: str) -> Iterator[tuple[int, Any]]:
    """A parquet file, row group by row group: those before `start` are not read."""
    from pyarrow import parquet

    reader = parquet.ParquetFile(file)
    names = reader.schema_arrow.names
    if text_column not in names:
        raise UserError(
            f"no column {text_column!r} among {', '.join(names) or 'no columns at all'}; name it with --text_column"
        )
    columns = [text_column, *(name for name in ("meta", *DOMAIN_KEYS) if name in names)]
    row = 0
    for group in range(reader.num_row_groups):
        size = reader.metadata.row_group(group).num_rows
        if row + size <= start:
            row += size
            continue
        for batch in reader.iter_batches(batch_size=64, row_groups=[group], columns=columns):
            for record in batch.to_pylist():
                if row >= start:
                    yield row, record
                row += 1


Reader = Callable[[IO[bytes], int, str], Iterator[tuple[int, Any]]]

#: File name ending -> reader of (row, record).
FORMATS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json.gz": read_json_lines,
    ".ndjson": read_json_lines,
    ".parquet": read_parquet,
    ".txt": read_text_lines,
    ".txt.gz": read_text_lines,
    ".txt.zst": read_text_lines,
}


def reader_of(name: str) -> Reader | None:
    """The reader for a file name, or None for a format that we do not read."""
    return next((reader for ending, reader in FORMATS.items() if name.lower().endswith(ending)), None)


def read_shard(shard: Shard, start: int, text_column: str) -> Iterator[tuple[int, Any]]:
    """(row, record) of one shard from row `start`. Raises UserError for a file that is not what its name says."""
    import pyarrow

    reader = reader_of(shard.name)
    assert reader is not None, shard.name  # a corpus lists only files that can be read
    try:
        with open_raw(shard.url) as raw, decompressed(raw, shard.name) as file:
            yield from reader(file, start, text_column)
    except EOFError:
        raise UserError(
            f"{shard.name}: the file is truncated: it ends inside its compressed data; fetch it again"
        ) from None
    except (pyarrow.ArrowInvalid, gzip.BadGzipFile) as error:
        raise UserError(f"{shard.name}: not a readable {reader_kind(shard.name)} file ({_one_line(error)})") from None
    except UserError as error:
        raise UserError(f"{shard.name}: {error}") from None
    except Exception as error:
        # backports.zstd raises its own ZstdError on 3.10 to 3.13.
        if type(error).__name__ == "ZstdError":
            raise UserError(
                f"{shard.name}: not a readable {reader_kind(shard.name)} file ({_one_line(error)})"
            ) from None
        raise


def reader_kind(name: str) -> str:
    return "." + name.rpartition(".")[2]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---- corpora -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An ordered list of shards. Small and picklable: what it lists is listed when it is read."""

    name: str
    """As the user named it."""
    mirror: str
    """As it was opened: `hub_id@revision`, `embedded` or `local`."""
    text_column: str
    repo: str | None = None
    revision: str | None = None
    prefixes: tuple[str, ...] = ()
    files: tuple[Shard, ...] = ()

    def shards(self) -> Iterator[Shard]:
        """Shards in reading order. On the Hub a page of 1,000 names is fetched when the reading reaches it."""
        if self.repo is None:
            yield from self.files
            return
        for prefix in self.prefixes:
            found = False
            for name in _list_names(self.repo, self.revision, prefix):
                found = True
                yield Shard(name, f"hf://datasets/{self.repo}@{self.revision}/{name}")
            if not found:
                raise UserError(f"{self.mirror}: no readable file under {prefix}")

    def records(self, start: Cursor, world_size: int = 1, rank: int = 0) -> Iterator[Document | Unusable]:
        """Documents from `start` to the end of the corpus; every `world_size`-th one, this rank's own."""
        waiting = start.shard is not None
        for shard in self.shards():
            if waiting and shard.name != start.shard:
                continue
            first = start.row if waiting or start.shard is None else 0
            waiting, start = False, Cursor(shard=shard.name)
            for row, record in read_shard(shard, first, self.text_column):
                if row % world_size != rank:
                    continue
                if isinstance(record, str):
                    yield Unusable(record, shard.name, row)
                else:
                    yield to_document(record, self.text_column, self.mirror, shard.name, row)
        if waiting:
            raise UserError(f"{self.mirror}: {start.shard} is not there any more; this run stopped inside it")

    def describe(self) -> dict[str, Any]:
        """What `recorded` needs to open the same corpus again."""
        return {
            "name": self.name,
            "mirror": self.mirror,
            "repo": self.repo,
            "revision": self.revision,
            "prefixes": list(self.prefixes),
            "text_column": self.text_column,
            "files": [[shard.name, shard.url] for shard in self.files],
        }


def recorded(description: dict[str, Any]) -> Corpus:
    """The corpus that a run recorded: that one and nothing else."""
    return Corpus(
        name=description["name"],
        mirror=description["mirror"],
        text_column=description["text_column"],
        repo=description["repo"],
        revision=description["revision"],
        prefixes=tuple(description["prefixes"]),
        files=tuple(Shard(name, url) for name, url in description["files"]),
    )


def _list_names(repo: str, revision: str | None, prefix: str) -> Iterator[str]:
    """Readable files of a Hub dataset under a prefix, in the Hub's order (by name), page by page."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    folder = prefix.rpartition("/")[0]
    for entry in HfApi().list_repo_tree(repo, folder or None, revision=revision, repo_type="dataset"):
        if isinstance(entry, RepoFile) and entry.path.startswith(prefix) and reader_of(entry.path):
            yield entry.path


def open_corpus(
    dataset: str,
    *,
    text_column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    waiting: Callable[[str], None] = lambda what: None,
) -> Corpus:
    """Open what `--dataset` names and read its first record. `waiting` is told what is being waited for.

    Raises UserError with one sentence when nothing opens, within `OPENING_SECONDS`, naming the offline command.
    """
    if dataset in CORPORA:
        return _first_that_opens(dataset, CORPORA[dataset], text_column, split, waiting)
    if dataset == "embedded":
        return _open_embedded(split, waiting)
    if any(mark in dataset for mark in "*?[") or os.path.exists(dataset) or reader_of(dataset):
        return _open_local(dataset, text_column)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) and not dataset.startswith("."):
        return _open_hub(dataset, text_column, split, config_name, revision, waiting)
    raise UserError(
        f"--dataset {dataset}: no such file, and not a Hub dataset id; expected {', '.join(CORPORA)}, embedded, a file "
        f"({', '.join(FORMATS)}), a 'glob' or an id like owner/name"
    )


def _open_embedded(split: str, waiting: Callable[[str], None]) -> Corpus:
    from slimpajama_hf import embedded

    folder = embedded.build(embedded.default_cache(), waiting)
    name = f"{split}.jsonl.zst"
    return Corpus("embedded", "embedded", "text", files=(Shard(name, str(folder / name)),))


def _open_local(pattern: str, text_column: str) -> Corpus:
    import glob

    readable = ", ".join(FORMATS)
    if os.path.isdir(pattern):
        raise UserError(
            f"--dataset {pattern}: a folder; name its files, as --dataset '{pattern.rstrip('/')}/*.jsonl.zst'"
        )
    if os.path.exists(pattern):
        paths = [pattern]
    else:
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not paths:
            raise UserError(f"--dataset {pattern}: no such file; expected a file or a 'glob' of {readable}")
    for path in paths:
        if not reader_of(path):
            raise UserError(
                f"--dataset {path}: cannot read {Path(path).suffix or 'a file without an ending'}; expected {readable}"
            )
        if not os.access(path, os.R_OK):
            raise UserError(f"--dataset {path}: no permission to read it")
    # Names relative to where all files lie: the ledger stays true when the folder is moved.
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    shards = tuple(Shard(os.path.relpath(os.path.abspath(path), base), os.path.abspath(path)) for path in paths)
    corpus = Corpus(pattern, "local", text_column, files=shards)
    _read_first(corpus)
    return corpus


def _read_first(corpus: Corpus) -> None:
    """Read until the first record, usable or not; raises what is wrong with the file."""
    for _ in corpus.records(Cursor()):
        return
    raise UserError(f"--dataset {corpus.name}: no record in {', '.join(shard.name for shard in corpus.files[:3])}")


def _knock_and_read(corpus: Corpus) -> None:
    """Ask whether the mirror is there (one small request, not repeated: no network shows at once), then read it."""
    from huggingface_hub import HfApi

    assert corpus.repo is not None
    HfApi().dataset_info(corpus.repo, revision=corpus.revision, expand=["sha"], timeout=8)
    _read_first(corpus)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run `work` in a thread of its own and give up after `seconds`: libraries below have retries of their own."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: the interpreter must not wait at its exit for a server that never answers.
    threading.Thread(target=run, name="opening", daemon=True).start()
    return future.result(timeout=max(seconds, 0.1))


def _why(error: BaseException, seconds: float) -> str:
    """A failure of the Hub in a few words."""
    if isinstance(error, concurrent.futures.TimeoutError):
        return f"no answer in {seconds:.0f} s"
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code:
        words = {401: "not there, private or gated", 403: "forbidden", 404: "not there", 429: "too many requests"}
        return f"HTTP {code} ({words.get(code, 'error')})"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, UserError):
        return str(error)
    if any(word in type(error).__name__ for word in ("Connect", "Timeout", "Network")) or isinstance(error, OSError):
        return "the Hub cannot be reached"
    return _one_line(error)


def _first_that_opens(
    dataset: str, mirrors: tuple[Mirror, ...], text_column: str, split: str, waiting: Callable[[str], None]
) -> Corpus:
    deadline = time.monotonic() + OPENING_SECONDS
    failures = []
    for number, mirror in enumerate(mirrors):
        waiting(f"waiting for {mirror.repo} on the Hub")
        # What is left is shared fairly: a mirror that hangs must not eat the time of the next ones.
        seconds = (deadline - time.monotonic()) / (len(mirrors) - number)
        prefixes = mirror.train if split == "train" else mirror.validation
        corpus = Corpus(dataset, mirror.name, text_column, mirror.repo, mirror.revision, prefixes)
        try:
            _within(seconds, lambda corpus=corpus: _knock_and_read(corpus))  # type: ignore[misc]
            return corpus
        except Exception as error:
            failures.append(f"{mirror.repo}: {_why(error, seconds)}")
    raise UserError(
        f"--dataset {dataset}: no mirror opens ({'; '.join(failures)}); without the Hub, train on text that is "
        f"here: {OFFLINE_COMMAND}"
    )


def _open_hub(
    dataset: str,
    text_column: str,
    split: str,
    config_name: str | None,
    revision: str | None,
    waiting: Callable[[str], None],
) -> Corpus:
    """Any dataset on the Hub whose files we read; `datasets` says which files make the split."""
    waiting(f"waiting for {dataset} on the Hub")

    def resolve() -> Corpus:
        import datasets
        from huggingface_hub import HfApi

        # One small request, not repeated: no network shows at once.
        HfApi().dataset_info(dataset, revision=revision, expand=["sha"], timeout=8)
        builder = datasets.load_dataset_builder(dataset, config_name, revision=revision)
        files = builder.config.data_files or {}
        if split not in files:
            raise UserError(f"no split {split!r}; it has {', '.join(map(str, files)) or 'none'} (--dataset_split)")
        urls = [str(url) for url in files[split]]
        # hf://datasets/owner/name@<commit>/path: the commit is resolved, so the corpus is pinned.
        parts = [re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url) for url in urls]
        if not all(parts) or not urls:
            raise UserError(f"its files are not plain files on the Hub ({urls[:1]})")
        odd = [url for url in urls if not reader_of(url)]
        if odd:
            raise UserError(f"cannot read {odd[0].rpartition('/')[2]}; expected {', '.join(FORMATS)}")
        commit = parts[0].group(2)  # type: ignore[union-attr]
        shards = tuple(Shard(part.group(3), url) for part, url in zip(parts, urls, strict=True) if part)
        corpus = Corpus(dataset, f"{dataset}@{commit[:12]}", text_column, files=shards)
        _read_first(corpus)
        return corpus

    try:
        return _within(OPENING_SECONDS, resolve)
    except Exception as error:
        raise UserError(
            f"--dataset {dataset}: no such file, and on the Hub it does not open ({_why(error, OPENING_SECONDS)}); "
            f"without the Hub: {OFFLINE_COMMAND}"
        ) from None


def stream(corpus: Corpus, start: Cursor, world_size: int = 1, rank: int = 0) -> datasets.IterableDataset:
    """The documents of a corpus as a streaming dataset of `datasets`, ready for `map`."""
    import datasets

    return datasets.IterableDataset.from_generator(
        _records_as_examples,
        gen_kwargs={"corpus": corpus, "start": start, "world_size": world_size, "rank": rank},
    )


def _records_as_examples(corpus: Corpus, start: Cursor, world_size: int, rank: int) -> Iterator[dict[str, Any]]:
    for record in corpus.records(start, world_size, rank):
        yield {"record": record}
