"""Finds the regions of an image: by segmenters, or in what tools and data sets have saved."""
