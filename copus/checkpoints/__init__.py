"""The checkpoints of a run: their contents, writing in the background, verification, and which ones are kept."""
