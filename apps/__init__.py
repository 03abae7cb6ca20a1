"""Holds the programs over a model: command line, server and web page."""
