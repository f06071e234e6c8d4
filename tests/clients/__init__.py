"""What a run leaves, in programs that others wrote: `make test-clients`. No part of `make test`."""
