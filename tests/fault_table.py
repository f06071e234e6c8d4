"""Print the rows that `make test-faults` collected as a Markdown table: `python -m tests.fault_table FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(rows: list[dict[str, object]]) -> str:
    """Rows with the same keys as a Markdown table; rows of one fault are added up."""
    merged: dict[str, dict[str, object]] = {}
    for row in rows:
        fault = str(row["fault"])
        if fault not in merged:
            merged[fault] = dict(row)
            continue
        for name, value in row.items():
            if isinstance(value, int):
                merged[fault][name] = int(str(merged[fault][name])) + value
        if row["bit-equal"] == "no":
            merged[fault]["bit-equal"] = "no"
    names = list(rows[0]) if rows else ["fault"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in merged.values()]
    return "\n".join(lines)


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    sys.stdout.write(table([json.loads(line) for line in text.splitlines()]) + "\n")
