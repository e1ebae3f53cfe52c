"""Asking a model the questions about its edits, and the scores."""
