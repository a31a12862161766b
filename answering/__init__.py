"""Many prompts about many images: in batches, on every device, and whole again after a kill."""
