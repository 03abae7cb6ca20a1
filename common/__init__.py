"""Holds what several folders share: files, folders, JSON, loading, special tokens."""
