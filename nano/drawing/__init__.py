"""Pictures with shapes and signs, and questions about them. It imports no other folder of nano."""
