"""The other commands: each file is one, and says its own flags."""
