"""Which layer computes and keeps its variables in what, and what of it is unsafe."""
