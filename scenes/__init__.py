"""Draws synthetic scenes with exact region masks, captions and questions."""
