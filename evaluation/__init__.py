"""The scores of the paper, by one command, and drawings of where the model looks."""
