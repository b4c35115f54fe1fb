"""Words, tables and pages that every framework's results show themselves with; no framework is loaded."""
