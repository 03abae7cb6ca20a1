"""Puts checkpoints on the Hub, with a model card."""
