"""Charts and files that are made from the record and can be made again at any time."""
