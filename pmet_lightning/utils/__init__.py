"""Utilities that every other folder may use: files, resources, processes, progress, memory."""
