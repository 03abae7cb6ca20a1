"""Makes training data of images with region masks: stages over records, without a scheduler."""
