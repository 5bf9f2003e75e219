"""Checkpoints on disk: which there are, whether they are whole, and their weights."""
