"""The frozen language model: where its parts are, forward passes, hooks, what is kept of a pass, its patch."""
