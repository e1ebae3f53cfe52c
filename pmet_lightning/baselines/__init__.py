"""Baselines that the editor is compared with."""
