"""What was asked for: flags and files of flags become settings, checked and resolved."""
