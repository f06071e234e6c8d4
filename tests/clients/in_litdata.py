"""What litdata's `StreamingDataset` gives of parquet files to 1, 2 and then 3 processes: printed as JSON.

`python in_litdata.py FOLDER`. A row of the files is `{"text": "document <its number>"}`.
"""

import json
import sys
from pathlib import Path

import litdata
from litdata.streaming.item_loader import ParquetLoader
from litdata.utilities.env import _DistributedEnv

folder = Path(sys.argv[1])
litdata.index_parquet_dataset(str(folder))


def reader(rank, processes, state=None):
    made = litdata.StreamingDataset(str(folder), item_loader=ParquetLoader(), shuffle=False, drop_last=False)
    # What torch.distributed would say of this process.
    made.distributed_env = _DistributedEnv(processes, rank, 1)
    if state is not None:
        made.load_state_dict(state)
    return made


def taken(dataset, most=10**9):
    return [
        int((row["text"] if isinstance(row, dict) else row[0]).split()[-1])
        for row, _ in zip(dataset, range(most), strict=False)
    ]


alone = taken(reader(0, 1))
two = [reader(rank, 2) for rank in range(2)]
begun = [taken(dataset, 50) for dataset in two]
state = two[0].state_dict(50, 0, 1)
rest = [taken(reader(rank, 3, state)) for rank in range(3)]
sys.stdout.write(json.dumps({"version": litdata.__version__, "alone": alone, "begun": begun, "rest": rest}) + "\n")
