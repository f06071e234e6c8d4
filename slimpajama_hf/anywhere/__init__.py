"""The stream, the record and other parts of this program for other people's training scripts."""
