"""Validation by domain and per-document scores."""
