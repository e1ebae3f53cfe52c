"""One run of a Trainer: its settings, its callbacks, the files in its folder."""
