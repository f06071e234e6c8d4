"""One start of the program: what it goes on from, its plan, its training, its summary."""
