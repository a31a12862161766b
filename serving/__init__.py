"""Answers over HTTP, in the protocol of OpenAI: `pheye serve`."""
