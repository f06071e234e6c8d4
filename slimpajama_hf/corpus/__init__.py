"""Where documents come from: a corpus, its mirrors and shards, and the place of each document in it."""
