"""The Python interface: edits a model object with a list of facts."""
