"""The report of a run: tables, figures, one HTML page."""
