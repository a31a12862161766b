"""The page of `pheye app`: a picture, a question, an answer, and where the model looked."""
