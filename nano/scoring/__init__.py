"""Pictures that training never shows, scores of the answers, and tables."""
