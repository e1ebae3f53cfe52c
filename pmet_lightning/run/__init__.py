"""A run of the Trainer: its settings, its callbacks, the files in its folder."""
