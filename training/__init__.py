"""Training: the paper's recipe, and fine-tuning on own data."""
