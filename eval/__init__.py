"""Measurements of models and indexes: see metrics.py and retrieval.py."""
