"""From a file of facts to checked edits, edit batches and token rows."""
