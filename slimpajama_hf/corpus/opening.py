"""Open a corpus: SlimPajama from one of its mirrors, the embedded corpus, local files, or any Hub dataset.

Each becomes a `Corpus`: shards in a fixed order, read as a stream of `Document`s. Each document carries its place
(mirror, shard, row), so that reading can start again at any row without reading the shards before it.

To add a corpus, add a row to `CORPORA`. File formats are in `formats.FORMATS`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from slimpajama_hf import screen
from slimpajama_hf.corpus import local_files
from slimpajama_hf.corpus.corpus import Corpus
from slimpajama_hf.corpus.documents import Cursor, Gap
from slimpajama_hf.corpus.formats import FORMATS, reader_of
from slimpajama_hf.corpus.patience import OutOfPatience, Patience
from slimpajama_hf.corpus.shards import Shard, printable
from slimpajama_hf.errors import UserError, one_line
from slimpajama_hf.files import looks_local

#: Seconds in which one of the mirrors must open, all tries together (the promise is 30 s on screen).
OPENING_SECONDS = 20.0

#: Seconds that a mirror may fail while it opens. Then the next mirror has its turn.
OPENING_PATIENCE = 4.0


@dataclasses.dataclass(frozen=True)
class Mirror:
    """One copy of a corpus on the Hub, pinned to a commit. Its files are listed folder by folder, when reached."""

    repo: str
    revision: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    """Prefixes of files, in reading order: `data/train-` is every file of `data` whose name starts with `train-`."""

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision[:12]}"


#: Revisions and layouts are from the dataset pages and from projects that pin them (see docs/data.md).
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

#: `--dataset NAME` -> mirrors of the same corpus, tried in this order.
CORPORA: dict[str, tuple[Mirror, ...]] = {
    "slimpajama": (_ORIGINAL, _REUPLOAD, _SIX_BILLION),
    "slimpajama_627b": (_ORIGINAL,),
    "slimpajama_627b_reupload": (_REUPLOAD,),
    "slimpajama_6b": (_SIX_BILLION,),
}

#: What to type when there is no Hub.
OFFLINE_COMMAND = "accelerate launch run_clm_slimpajama.py --dataset embedded --model tiny --tokenizer builtin"


def open_corpus(
    dataset: str,
    *,
    text_column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
    skip_broken_shards: bool = False,
    txt_documents: str = "line",
    waiting: Callable[[str], None] = lambda what: None,
) -> Corpus:
    """Open what `--dataset` names, and read its first record. `waiting` is called with what is being waited for.

    Raises UserError within `OPENING_SECONDS` if nothing opens; the message has the command to train without the Hub.
    """
    if dataset in CORPORA:
        return _first_that_opens(dataset, CORPORA[dataset], text_column, split, skip_broken_shards, waiting)
    if dataset == "embedded":
        return _open_embedded(split, waiting)
    here = os.path.expanduser(dataset)
    if any(mark in dataset for mark in "*?[") or os.path.lexists(here) or reader_of(dataset):
        return _open_local(dataset, text_column, txt_documents, skip_broken_shards)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) and not looks_local(dataset):
        corpus = _open_hub(dataset, text_column, split, config_name, revision, skip_broken_shards, waiting)
        return dataclasses.replace(corpus, txt_documents=txt_documents)
    raise UserError(
        f"--dataset {printable(dataset)}: no such file, and not a Hub dataset id; expected {', '.join(CORPORA)}, "
        f"embedded, a file ({', '.join(FORMATS)}), a folder, a 'glob' or an id like owner/name"
    )


def _open_embedded(split: str, waiting: Callable[[str], None]) -> Corpus:
    from slimpajama_hf.corpus import embedded

    folder = embedded.build(embedded.default_cache(), waiting)
    name = f"{split}.jsonl.zst"
    return Corpus("embedded", "embedded", "text", files=(Shard(name, str(folder / name)),))


def _open_local(dataset: str, text_column: str, txt_documents: str, skip_broken_shards: bool) -> Corpus:
    found = local_files.find(dataset)
    files = local_files.shards(found.paths, skip_broken_shards)
    corpus = Corpus(printable(dataset), "local", text_column, files=files, txt_documents=txt_documents)
    _read_first(corpus, skip_broken_shards)
    if found.left_out:
        screen.say(f"--dataset {corpus.name}: not read, for their names: {found.left_out_in_words()}")
    return corpus


def _read_first(corpus: Corpus, skip_broken_shards: bool) -> None:
    """Read up to the first record, usable or not. Raises what is wrong with the files."""
    patience = Patience(OPENING_PATIENCE)
    for record in corpus.records(Cursor(), skip_broken_shards=skip_broken_shards, patience=patience):
        if not isinstance(record, Gap):
            return
    raise UserError(f"--dataset {corpus.name}: no record in {', '.join(shard.name for shard in corpus.files[:3])}")


def _knock_and_read(corpus: Corpus, skip_broken_shards: bool) -> None:
    """Ask once, with a small request, whether the mirror is there, so that a missing network shows at once; read it."""
    from huggingface_hub import HfApi

    assert corpus.repo is not None
    HfApi().dataset_info(corpus.repo, revision=corpus.revision, expand=["sha"], timeout=8)
    _read_first(corpus, skip_broken_shards)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Run `work` in a thread and give up after `seconds`, because the libraries that it calls retry for longer."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # A daemon thread: the interpreter must not wait at exit for a server that never answers.
    threading.Thread(target=run, name="opening", daemon=True).start()
    return future.result(timeout=max(seconds, 0.1))


def _why(error: BaseException, seconds: float) -> str:
    """Describe a failure of the Hub in a few words."""
    if isinstance(error, concurrent.futures.TimeoutError):
        return f"no answer in {seconds:.0f} s"
    if isinstance(error, OutOfPatience) and error.__cause__ is not None:
        error = error.__cause__
    from slimpajama_hf.corpus import hub_files

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
        # Each mirror gets its share of the time that is left: one that hangs must not use up that of the others.
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
    """Open any Hub dataset whose files we can read. `datasets` says which files belong to the split."""
    waiting(f"waiting for {dataset} on the Hub")

    def resolve() -> Corpus:
        import datasets
        from huggingface_hub import HfApi

        # One small request without retries: a missing network shows at once.
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


def validation_of(corpus: Corpus, flag: str = "--eval_dataset") -> Corpus:
    """Return the held-out part of a corpus: its own validation part, or else the fraction that its run held out.

    Raises UserError if it has neither; the message suggests `flag`.
    """
    own = own_validation_of(corpus)
    if own is not None:
        return own
    if corpus.held_out_fraction:
        return corpus.held_out()
    raise UserError(
        f"{corpus.name} has no validation part of its own, and nothing of it was held out; name held-out documents "
        f"with {flag}, as another file"
    )


def own_validation_of(corpus: Corpus) -> Corpus | None:
    """Return the validation part that a corpus itself has; None if it has none."""
    if corpus.mirror == "embedded":
        return open_corpus("embedded", split="validation")
    for mirrors in CORPORA.values():
        for mirror in mirrors:
            if corpus.mirror == mirror.name:
                return dataclasses.replace(corpus, prefixes=mirror.validation)
    return None
