"""What the commands that train share: sizes, labels, lessons, features that are kept, checkpoints."""
