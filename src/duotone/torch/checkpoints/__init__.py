"""Checkpoints: what is in one, and how it is written by one process or several so that a crash loses nothing."""
