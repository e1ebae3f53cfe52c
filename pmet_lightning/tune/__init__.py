"""The search for the settings of a model: which layers, which targets, how much is written."""
