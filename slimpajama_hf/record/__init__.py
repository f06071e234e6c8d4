"""What a run leaves: ledger, surprisals, checkpoints, and the folder that holds them."""
