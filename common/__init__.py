"""What the commands of all rooms share. It imports no room."""
