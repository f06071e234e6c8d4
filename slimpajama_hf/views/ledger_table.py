"""The ledger as a Parquet table: one row per step, with the type of every column in the file.

Readers of JSON lines guess types from the first rows, where much is null: then `datasets` fails and DuckDB gives NULL.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import files
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import ledger
from slimpajama_hf.record.run_folder import RunFolder

if TYPE_CHECKING:
    import pyarrow

#: How many rows are converted at once; also the row group size of the file.
_ROWS = 20_000


@dataclasses.dataclass(frozen=True)
class Written:
    """A summary of the written table."""

    rows: int
    columns: int
    left_out: tuple[str, ...]
    """Fields of rows that are neither this program's nor numbers."""
    torn: bool
    """Whether the ledger ends in half a row, which is not in the table."""


def write(folder: RunFolder, target: Path) -> Written:
    """Write the ledger of a run as a Parquet table to `target`. Raises UserError for a ledger that cannot be read."""
    import pyarrow
    from pyarrow import parquet

    record = folder.read_record()
    tables, left_out = [], set[str]()
    rows = _rows(folder.ledger)
    while batch := list(itertools.islice(rows, _ROWS)):
        added = sorted({name for row in batch for name in ledger.added(row)})
        schema = _schema(added)
        left_out |= {name for row in batch for name in row.keys() - set(schema.names)}
        try:
            tables.append(pyarrow.Table.from_pylist([_as_lists(row) for row in batch], schema=schema))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{folder.ledger}: between steps {batch[0]['step']:,} and {batch[-1]['step']:,} a value is not of its "
                f"type ({str(error).splitlines()[0]}); python -m slimpajama_hf verify {folder.path} says which row"
            ) from None
    # Numbers that a later session added are null in earlier rows.
    table = pyarrow.concat_tables(tables or [_schema([]).empty_table()], promote_options="default")
    about = {"run_id": record.get("run_id"), "model": record["model"].get("name"), "corpus": record["corpus"]["name"]}
    table = table.replace_schema_metadata({"slimpajama_hf": json.dumps(about)})
    temporary = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        parquet.write_table(table, temporary, row_group_size=_ROWS, compression="zstd")
        files.sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return Written(table.num_rows, table.num_columns, tuple(sorted(left_out)), _is_torn(folder.ledger))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: there is no ledger; expected the folder of a run")
    try:
        yield from ledger.rows(path)
    except ledger.Damaged as error:
        raise UserError(f"{error}; python -m slimpajama_hf verify {path.parent} says what else is wrong") from None


def _is_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        return file.read() not in (b"", b"\n")


def _as_lists(row: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries by reason and by layer as lists, because a struct type would have to name every key."""
    return row | {
        "skipped": [{"reason": name, "records": count} for name, count in row.get("skipped", {}).items()],
        "grad_layers": [
            {"layer": name, "grad_square": pair[0], "grad_agreement": pair[1]}
            for name, pair in row.get("grad_layers", {}).items()
        ],
    }


def _schema(added: list[str]) -> pyarrow.Schema:
    """The columns of the table: the fields of `Row` in order, the `added` numbers, `chain`."""
    import pyarrow

    kinds = {
        "int": pyarrow.int64(), "float": pyarrow.float64(), "float | None": pyarrow.float64(), "str": pyarrow.string(),
        "bool": pyarrow.bool_(),
    }  # fmt: skip

    def list_of(**fields: str) -> pyarrow.DataType:
        return pyarrow.list_(pyarrow.struct([(name, kinds[kind]) for name, kind in fields.items()]))

    documents = list_of(shard="str", row="int", text_sha1="str", first_token="int", tokens="int")
    samples = list_of(
        rank="int", shard="str", row="int", text_sha1="str", domain="str", part="int", tokens="int", text_bytes="int",
        tokens_cut="int", loss="float", accuracy="float",
    )  # fmt: skip
    lists = {
        "skipped": list_of(reason="str", records="int"),
        "gaps": list_of(shard="str", row="int", reason="str"),
        "grad_layers": list_of(layer="str", grad_square="float", grad_agreement="float"),
        "documents": documents,
        "samples": pyarrow.list_(pyarrow.struct([*samples.value_type, ("documents", documents)])),
    }
    columns = [
        (field.name, lists[field.name] if field.name in lists else kinds[str(field.type)])
        for field in dataclasses.fields(ledger.Row)
        if field.name != "added"
    ]
    return pyarrow.schema([*columns, *((name, kinds["float"]) for name in added), ("chain", kinds["str"])])
