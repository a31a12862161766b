"""Scores of answers: pure functions of texts and numbers."""
