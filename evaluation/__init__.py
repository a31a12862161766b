"""The scores of the paper, by one command, and pictures of where the model looks."""
