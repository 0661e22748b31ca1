"""Corpus -> chunks -> vectors -> index -> neighbors."""
