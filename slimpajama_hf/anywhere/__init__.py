"""The stream, the record and the parts of this program for training scripts that others wrote."""
