"""The model: its sizes, its step written out, its optimizers, its average, and how it writes."""
