"""Measures a checkpoint: its captions on benchmarks, its answers, and what they cost."""
