"""Retrieval-enhanced language models: see README.md."""
