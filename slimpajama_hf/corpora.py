"""Where text comes from: mirrors of SlimPajama, the embedded corpus, local files, any Hub dataset.

Each becomes a `Corpus`: shards in a fixed order and records inside them, read as a stream of `Document`s. The place of
a document (mirror, shard, row) rides with it, so reading can start again at any row without a look at earlier shards.

To add a corpus: a row in `CORPORA`. File formats stand in `shards.FORMATS`.
"""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slimpajama_hf.errors import UserError
from slimpajama_hf.patience import OutOfPatience, Patience
from slimpajama_hf.patience import StopRequested as StopRequested  # what the trainer takes for a stop
from slimpajama_hf.shards import DOMAIN_KEYS, FORMATS, BrokenShard, Shard, fingerprint, one_line, read_shard, reader_of

#: Seconds that all mirrors together may take to open before the program gives up (the promise is 30 s on screen).
OPENING_SECONDS = 20.0

#: Seconds that a mirror's failures are sat out while it opens; then the next one has its turn.
OPENING_PATIENCE = 4.0

#: So many broken shards in a row are no broken shards: the source itself is wrong, `--skip_broken_shards` or not.
MOST_BROKEN_IN_A_ROW = 10

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
    """A place in a corpus: what is read next. `row` counts records of `shard` from 0, `token` tokens of that record.

    Scalars alone, each with a default: it is kept in checkpoints, and those of older versions have fewer fields. In a
    shuffled block (`size` above 0) shard and row are where the block begins, not the record.
    """

    epoch: int = 0
    """Which pass over the corpus, from 0."""
    shard: str | None = None
    """None: the first shard."""
    row: int = 0
    token: int = 0
    block: int = 0
    """Number of the shuffled block in its pass."""
    used: int = 0
    """Records of the block already used, in its shuffled order."""
    size: int = 0
    """Records in the block; 0: not inside one."""


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
    here: Cursor = Cursor()
    """Where reading must start to read it again."""
    after: Cursor = Cursor()
    """Where reading goes on after it."""


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A record that cannot be trained on, and why."""

    reason: str
    shard: str
    row: int
    here: Cursor = Cursor()
    after: Cursor = Cursor()


@dataclasses.dataclass(frozen=True)
class Gap:
    """The rest of a shard that was set aside, from `row` on; `after` is the start of the next shard."""

    reason: str
    shard: str
    row: int
    here: Cursor = Cursor()
    after: Cursor = Cursor()


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

    def shards(self, patience: Patience | None = None) -> Iterator[Shard]:
        """Shards in reading order. On the Hub a page of 1,000 names is fetched when the reading reaches it."""
        if self.repo is None:
            yield from self.files
            return
        for prefix in self.prefixes:
            found = False
            for name in _list_names(self.repo, self.revision, prefix, patience or Patience()):
                found = True
                yield Shard(name, f"hf://datasets/{self.repo}@{self.revision}/{name}")
            if not found:
                raise UserError(f"{self.mirror}: no readable file under {prefix}")

    def records(
        self,
        start: Cursor,
        *,
        skip_broken_shards: bool = False,
        patience: Patience | None = None,
    ) -> Iterator[Document | Unusable | Gap]:
        """Documents from `start` to the end of this pass, in order.

        Raises BrokenShard at a file that cannot be read; with `skip_broken_shards` a Gap stands there instead, and
        reading goes on with the next shard.
        """
        patience = patience or Patience()
        waiting = start.shard is not None
        gap: Gap | None = None
        broken_in_a_row = 0
        for shard in self.shards(patience):
            if waiting and shard.name != start.shard:
                continue
            first = start.row if waiting or start.shard is None else 0
            waiting, start = False, Cursor(start.epoch, shard.name)
            if gap is not None:
                # Held back until the shard after it is known, which is where reading goes on.
                yield dataclasses.replace(gap, after=start)
                gap = None
            try:
                for row, record in read_shard(shard, first, self.text_column, patience):
                    broken_in_a_row = 0
                    here, after = dataclasses.replace(start, row=row), dataclasses.replace(start, row=row + 1)
                    found: Document | Unusable
                    if isinstance(record, str):
                        found = Unusable(record, shard.name, row)
                    else:
                        found = to_document(record, self.text_column, self.mirror, shard.name, row)
                    yield dataclasses.replace(found, here=here, after=after)
            except BrokenShard as error:
                if not skip_broken_shards:
                    raise
                broken_in_a_row += 1
                if broken_in_a_row == MOST_BROKEN_IN_A_ROW:
                    raise UserError(
                        f"{self.name} ({self.mirror}): {broken_in_a_row} shards in a row cannot be read, the last: "
                        f"{error.shard}: {error.reason}"
                    ) from None
                place = dataclasses.replace(start, row=error.row)
                gap = Gap(error.reason, shard.name, error.row, place, place)
        if gap is not None:
            yield gap
        if waiting:
            raise UserError(f"{self.mirror}: {start.shard} is not there any more; this run stopped inside it")

    def describe(self) -> dict[str, Any]:
        """What `recorded` needs to open the same corpus again, and `check_unchanged` to see whether it is the same."""
        return {
            "name": self.name,
            "mirror": self.mirror,
            "repo": self.repo,
            "revision": self.revision,
            "prefixes": list(self.prefixes),
            "text_column": self.text_column,
            "files": [_described(shard) for shard in self.files],
        }


def _described(shard: Shard) -> list[Any]:
    if not shard.is_local:
        return [shard.name, shard.url]
    if shard.fingerprint is not None:
        return [shard.name, shard.url, shard.size, shard.fingerprint]
    try:
        return [shard.name, shard.url, *fingerprint(shard.url)]
    except OSError:
        # Reading will say what is wrong with it, when it is reached.
        return [shard.name, shard.url]


def recorded(description: dict[str, Any]) -> Corpus:
    """The corpus that a run recorded: that one and nothing else. Whether it is still the same: `check_unchanged`."""
    return Corpus(
        name=description["name"],
        mirror=description["mirror"],
        text_column=description["text_column"],
        repo=description["repo"],
        revision=description["revision"],
        prefixes=tuple(description["prefixes"]),
        # Runs of older versions noted name and url alone.
        files=tuple(Shard(*entry) for entry in description["files"]),
    )


def check_unchanged(corpus: Corpus, waiting: Callable[[str], None] = lambda what: None) -> Corpus:
    """The corpus, if its local files are still those that its run began with (by size and both ends of each).

    An embedded corpus whose cache is gone is built again. Raises UserError that names the file and what differs. Files
    on the Hub are pinned by their commit: nothing to check.
    """
    if corpus.mirror == "embedded" and not all(os.path.isfile(shard.url) for shard in corpus.files):
        from slimpajama_hf import embedded

        folder = embedded.build(embedded.default_cache(), waiting)
        moved = tuple(dataclasses.replace(shard, url=str(folder / shard.name)) for shard in corpus.files)
        corpus = dataclasses.replace(corpus, files=moved)
    for number, shard in enumerate(corpus.files):
        if shard.fingerprint is None or not shard.is_local:
            continue
        if number % 100 == 99:
            waiting(f"checking that the corpus is unchanged: {number + 1:,} of {len(corpus.files):,} files")
        difference = _difference(shard)
        if difference is not None:
            reason = " (it was cut from the sources of another Python)" if corpus.mirror == "embedded" else ""
            raise UserError(
                f"{shard.url}: {difference}{reason}; this run began with it as it was: put it back, or start anew in "
                "another --output_dir"
            )
    return corpus


def _difference(shard: Shard) -> str | None:
    """What is different about a local file since its fingerprint was taken; None: nothing."""
    try:
        size, digest = fingerprint(shard.url)
    except FileNotFoundError:
        return "not there any more"
    except OSError as error:
        return f"cannot be read ({one_line(error)})"
    if size != shard.size:
        return f"changed: it has {size:,} bytes and had {shard.size:,}"
    return "changed: its content is another" if digest != shard.fingerprint else None


def _list_names(repo: str, revision: str | None, prefix: str, patience: Patience) -> Iterator[str]:
    """Readable files of a Hub dataset under a prefix, in the Hub's order (by name), page by page."""
    from slimpajama_hf import hub_files

    try:
        for path in hub_files.list_folder(repo, revision, prefix.rpartition("/")[0], patience):
            if path.startswith(prefix) and reader_of(path):
                yield path
    except Exception as error:
        status = hub_files.status_of(error)
        if status is None or isinstance(error, UserError):
            raise
        raise UserError(f"{repo}: the list of {prefix}: {hub_files.status_words(status)}") from error


def open_corpus(
    dataset: str,
    *,
    text_column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    skip_broken_shards: bool = False,
    waiting: Callable[[str], None] = lambda what: None,
) -> Corpus:
    """Open what `--dataset` names and read its first record. `waiting` is told what is being waited for.

    Raises UserError with one sentence when nothing opens, within `OPENING_SECONDS`, naming the offline command.
    """
    if dataset in CORPORA:
        return _first_that_opens(dataset, CORPORA[dataset], text_column, split, skip_broken_shards, waiting)
    if dataset == "embedded":
        return _open_embedded(split, waiting)
    if any(mark in dataset for mark in "*?[") or os.path.exists(dataset) or reader_of(dataset):
        return _open_local(dataset, text_column, skip_broken_shards)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) and not dataset.startswith("."):
        return _open_hub(dataset, text_column, split, config_name, revision, skip_broken_shards, waiting)
    raise UserError(
        f"--dataset {dataset}: no such file, and not a Hub dataset id; expected {', '.join(CORPORA)}, embedded, a file "
        f"({', '.join(FORMATS)}), a 'glob' or an id like owner/name"
    )


def _open_embedded(split: str, waiting: Callable[[str], None]) -> Corpus:
    from slimpajama_hf import embedded

    folder = embedded.build(embedded.default_cache(), waiting)
    name = f"{split}.jsonl.zst"
    return Corpus("embedded", "embedded", "text", files=(Shard(name, str(folder / name)),))


def _open_local(pattern: str, text_column: str, skip_broken_shards: bool) -> Corpus:
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
    _read_first(corpus, skip_broken_shards)
    return corpus


def _read_first(corpus: Corpus, skip_broken_shards: bool) -> None:
    """Read until the first record, usable or not; raises what is wrong with the file."""
    patience = Patience(OPENING_PATIENCE)
    for record in corpus.records(Cursor(), skip_broken_shards=skip_broken_shards, patience=patience):
        if not isinstance(record, Gap):
            return
    raise UserError(f"--dataset {corpus.name}: no record in {', '.join(shard.name for shard in corpus.files[:3])}")


def _knock_and_read(corpus: Corpus, skip_broken_shards: bool) -> None:
    """Ask whether the mirror is there (one small request, not repeated: no network shows at once), then read it."""
    from huggingface_hub import HfApi

    assert corpus.repo is not None
    HfApi().dataset_info(corpus.repo, revision=corpus.revision, expand=["sha"], timeout=8)
    _read_first(corpus, skip_broken_shards)


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
    if isinstance(error, OutOfPatience) and error.__cause__ is not None:
        error = error.__cause__
    from slimpajama_hf import hub_files

    status = hub_files.status_of(error)
    if status:
        return hub_files.status_words(status)
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, UserError):
        return str(error)
    if any(word in type(error).__name__ for word in ("Connect", "Timeout", "Network")) or isinstance(error, OSError):
        return "the Hub cannot be reached"
    return one_line(error)


def _first_that_opens(
    dataset: str,
    mirrors: tuple[Mirror, ...],
    text_column: str,
    split: str,
    skip_broken_shards: bool,
    waiting: Callable[[str], None],
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
            _within(seconds, lambda corpus=corpus: _knock_and_read(corpus, skip_broken_shards))  # type: ignore[misc]
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
    skip_broken_shards: bool,
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
        _read_first(corpus, skip_broken_shards)
        return corpus

    try:
        return _within(OPENING_SECONDS, resolve)
    except Exception as error:
        raise UserError(
            f"--dataset {dataset}: no such file, and on the Hub it does not open ({_why(error, OPENING_SECONDS)}); "
            f"without the Hub: {OFFLINE_COMMAND}"
        ) from None
