"""Converts checkpoints of other layouts to this package's."""
