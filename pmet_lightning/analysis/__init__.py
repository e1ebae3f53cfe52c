"""Analysis of a model: what attention and FFN do with facts it knows, and which layers to edit (``analyze``)."""
