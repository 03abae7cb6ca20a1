"""Captions images from the command line or Python, and draws the results."""
