"""Asking a model the questions of the edits, and the scores."""
