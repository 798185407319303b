"""What the tests share: runs of the trainer, tiny models, small data."""
