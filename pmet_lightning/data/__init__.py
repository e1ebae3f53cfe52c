"""From a file of facts to validated edits, edit batches and token rows."""
