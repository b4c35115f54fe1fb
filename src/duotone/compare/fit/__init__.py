"""The largest micro-batch that fits into a given memory."""
