"""Step 1: the target vectors, found by gradient descent on the residual deltas."""
