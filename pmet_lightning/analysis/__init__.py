"""A look inside: what attention and FFN do with facts a model knows, and which layers to edit (``analyze``)."""
