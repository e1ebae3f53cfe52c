"""What a run shows: tables, figures, one page."""
