"""The second moments of keys over general text, collected once and stored."""
