"""Pheye-nano from nothing: pictures, pre-training of both frozen parts, and the paper's three stages."""
