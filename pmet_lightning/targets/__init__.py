"""Target vectors, found by gradient descent on the deltas (docs/method.md, 'Targets')."""
