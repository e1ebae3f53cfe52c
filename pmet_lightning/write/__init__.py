"""Steps 2 and 3: keys, residuals, and the spread over the edited layers."""
