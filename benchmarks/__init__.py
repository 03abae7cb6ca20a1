"""Times decoding, preprocessing and training, and measures what parts of the model buy."""
