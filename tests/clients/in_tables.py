"""The ledger in DuckDB, polars, pandas and `datasets`: rows, sums, types, and columns that are null at first."""

import sys
import tempfile

import datasets
import duckdb
import pandas
import polars
from answers import Answers

answers = Answers(sys.argv[1])
answers.versions(duckdb, polars, pandas, datasets)
path, expected = answers.request["table"], answers.request["expected_table"]


def compare(rows, loss, spikes, late, nested):
    answers.equal((rows, spikes), (expected["rows"], expected["spikes"]))
    answers.close(loss, expected["loss"], 1e-6)
    answers.equal(late, expected["late"])
    answers.equal(nested, expected["nested"])


with answers.check("duckdb"):
    found = duckdb.sql(
        f"select count(*), sum(loss), count(spike), max(my_number), list(skipped[1].records) filter (len(skipped) > 0) from '{path}'"
    ).fetchall()[0]
    compare(found[0], found[1], found[2], found[3], found[4])
with answers.check("polars"):
    table = polars.read_parquet(path)
    nested = [each[0]["records"] for each in table["skipped"].to_list() if each]
    compare(len(table), table["loss"].sum(), table["spike"].count(), table["my_number"].max(), nested)
with answers.check("pandas"):
    frame = pandas.read_parquet(path)
    nested = [each[0]["records"] for each in frame["skipped"] if len(each)]
    compare(len(frame), frame["loss"].sum(), int(frame["spike"].count()), frame["my_number"].max(), nested)
with answers.check("datasets"), tempfile.TemporaryDirectory() as cache:
    data = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=cache)
    spikes = [value for value in data["spike"] if value is not None]
    late = max(value for value in data["my_number"] if value is not None)
    nested = [each[0]["records"] for each in data["skipped"] if each]
    compare(len(data), sum(data["loss"]), len(spikes), late, nested)
answers.end()
