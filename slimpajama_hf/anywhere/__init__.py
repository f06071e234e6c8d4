"""The public face: this program part by part for its script and copies of it, and parts of it for any script."""
