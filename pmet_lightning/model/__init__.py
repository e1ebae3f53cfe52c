"""The frozen language model: its modules, forward passes, hooks, cached keys and values, and its patch."""
