"""What a comparison came to: figures, verdicts, tables, charts and a page."""
