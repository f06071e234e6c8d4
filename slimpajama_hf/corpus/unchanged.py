"""The corpus that a run recorded, and the check that it is still the same."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from slimpajama_hf.corpus.corpus import Corpus
from slimpajama_hf.corpus.shards import Shard, fingerprint
from slimpajama_hf.errors import UserError, one_line


def recorded(description: dict[str, Any]) -> Corpus:
    """Return exactly the corpus that a run recorded. `check_unchanged` tells whether it is still the same."""
    return Corpus(
        name=description["name"],
        mirror=description["mirror"],
        text_column=description["text_column"],
        repo=description["repo"],
        revision=description["revision"],
        prefixes=tuple(description["prefixes"]),
        # Older versions recorded name and url alone.
        files=tuple(Shard(*entry) for entry in description["files"]),
        # Runs of older versions are read as they were, and held nothing out.
        txt_documents=description.get("txt_documents"),
        held_out_fraction=description.get("held_out_fraction", 0.0),
    )


def check_unchanged(corpus: Corpus, waiting: Callable[[str], None] = lambda what: None) -> Corpus:
    """Return the corpus if its local files are those that the run began with (by size and by both ends of each file).

    An embedded corpus whose cache is gone is built again. Raises UserError that names the file and what differs. Files
    on the Hub are pinned by a commit, so there is nothing to check.
    """
    if corpus.mirror == "embedded" and not all(os.path.isfile(shard.path) for shard in corpus.files):
        from slimpajama_hf.corpus import embedded

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
    """What has changed in a local file since its fingerprint was taken; None: nothing."""
    try:
        size, digest = fingerprint(shard.path)
    except FileNotFoundError:
        return "not there any more"
    except OSError as error:
        return f"cannot be read ({one_line(error)})"
    if size != shard.size:
        return f"changed: it has {size:,} bytes and had {shard.size:,}"
    return "changed: its content is another" if digest != shard.fingerprint else None
