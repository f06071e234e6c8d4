"""`Corpus`: an ordered list of shards, read as a stream of records from any place."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from slimpajama_hf.corpus import documents
from slimpajama_hf.corpus.documents import HELD_OUT, Cursor, Document, Gap, Unusable
from slimpajama_hf.corpus.formats import TXT_DOCUMENTS, Reading, ending_of, reader_of
from slimpajama_hf.corpus.patience import Patience
from slimpajama_hf.corpus.shards import BrokenShard, Shard, fingerprint, read_shard
from slimpajama_hf.errors import UserError

#: So many broken shards in a row mean that the source itself is wrong. This ends even `--skip_broken_shards`.
MOST_BROKEN_IN_A_ROW = 10


# ---- corpora -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An ordered list of shards. Small and picklable, because the names of files are listed only when it is read."""

    name: str
    """The name that the user gave."""
    mirror: str
    """The source that was opened: `hub_id@revision`, `embedded` or `local`."""
    text_column: str
    repo: str | None = None
    revision: str | None = None
    prefixes: tuple[str, ...] = ()
    files: tuple[Shard, ...] = ()
    txt_documents: str | None = "line"
    """What one document of a plain text file is (`formats.TXT_DOCUMENTS`). None: the run's version had no choice."""
    held_out_fraction: float = 0.0
    """Fraction of the documents that training never reads (`documents.is_held_out`)."""
    gives_held_out: bool = False
    """Whether reading gives the held-out documents instead of all others."""

    @property
    def comes_from_hub(self) -> bool:
        return self.repo is not None or any(shard.url.startswith("hf://") for shard in self.files[:1])

    @property
    def is_on_this_machine(self) -> bool:
        """Whether it is local files. The embedded corpus does not count, because it comes with this program."""
        return self.mirror == "local" and all(shard.is_local for shard in self.files)

    @property
    def reading(self) -> Reading:
        return Reading(self.text_column, self.txt_documents)

    def held_out(self) -> Corpus:
        """The same corpus, reduced to its held-out documents."""
        return dataclasses.replace(self, gives_held_out=True)

    def files_in_words(self) -> str:
        """Describe local files: `3 files: 2 .jsonl, 1 .txt (one line is one document)`. Empty for any other corpus."""
        if self.mirror != "local":
            return ""
        kinds = Counter(ending_of(shard.name) for shard in self.files)
        words = []
        for ending, count in sorted(kinds.items(), key=str):
            how = f" ({TXT_DOCUMENTS[self.txt_documents or 'line']})" if str(ending).startswith(".txt") else ""
            words.append(f"{count:,} {ending}{how}")
        return f"{len(self.files):,} file{'s' * (len(self.files) != 1)}: {', '.join(words)}"

    def shards(self, patience: Patience | None = None) -> Iterator[Shard]:
        """Yield the shards in reading order. The Hub lists them in pages of 1,000 names, each fetched when needed."""
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
        """Yield documents and unusable records from `start` to the end of this pass, in order.

        Raises BrokenShard at a file that cannot be read. With `skip_broken_shards` a Gap comes instead, and reading
        goes on with the next shard.
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
                # The gap waits until the next shard is known, because reading goes on there.
                yield dataclasses.replace(gap, after=start)
                gap = None
            try:
                for row, record in read_shard(shard, first, self.reading, patience):
                    broken_in_a_row = 0
                    # New objects: `dataclasses.replace` took a third of the time of reading.
                    here, after = Cursor(start.epoch, shard.name, row), Cursor(start.epoch, shard.name, row + 1)
                    found: Document | Unusable
                    if isinstance(record, str):
                        found = Unusable(record, shard.name, row, here, after)
                    else:
                        found = documents.to_document(
                            record, self.text_column, self.mirror, shard.name, row, here, after
                        )
                    if self.held_out_fraction and isinstance(found, Document):
                        held_out = documents.is_held_out(found.sha1, self.held_out_fraction)
                        if self.gives_held_out and not held_out:
                            continue
                        if held_out and not self.gives_held_out:
                            found = Unusable(HELD_OUT, shard.name, row, here, after)
                    yield found
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
        """Return what `recorded` needs to open the same corpus again, and `check_unchanged` to compare it."""
        return {
            "name": self.name,
            "mirror": self.mirror,
            "repo": self.repo,
            "revision": self.revision,
            "prefixes": list(self.prefixes),
            "text_column": self.text_column,
            "files": [_described(shard) for shard in self.files],
            "txt_documents": self.txt_documents,
            "held_out_fraction": self.held_out_fraction,
        }


def _described(shard: Shard) -> list[Any]:
    if not shard.is_local:
        return [shard.name, shard.url]
    if shard.fingerprint is not None:
        return [shard.name, shard.url, shard.size, shard.fingerprint]
    try:
        return [shard.name, shard.url, *fingerprint(shard.path)]
    except OSError:
        # Reading will report the error when it comes to this file.
        return [shard.name, shard.url]


def _list_names(repo: str, revision: str | None, prefix: str, patience: Patience) -> Iterator[str]:
    """Readable files of a Hub dataset under a prefix, in the Hub's order (by name), page by page."""
    from slimpajama_hf.corpus import hub_files

    try:
        for path in hub_files.list_folder(repo, revision, prefix.rpartition("/")[0], patience):
            if path.startswith(prefix) and reader_of(path):
                yield path
    except Exception as error:
        status = hub_files.status_of(error)
        if status is None or isinstance(error, UserError):
            raise
        raise UserError(f"{repo}: the list of {prefix}: {hub_files.status_words(status)}") from error
