"""Commands about a finished run: verify, rewind, compare, inspect, search."""
