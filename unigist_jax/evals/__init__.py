"""Evaluation: perplexity (packed, and by position), recall, and their plots."""
