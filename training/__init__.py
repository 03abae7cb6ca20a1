"""Trains and fine-tunes models as YAML recipes say."""
