"""What is drawn and written from the record and can be made again at any time."""
