"""From a published checkpoint to a folder that transformers loads; the command is `convert_checkpoint.py`."""
