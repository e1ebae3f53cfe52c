"""The same in Python: a model object, a list of facts."""
