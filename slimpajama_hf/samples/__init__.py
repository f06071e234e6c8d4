"""A document becomes a sample: tokenizers, cutting, the order of documents, the stream that can go on."""
