"""Averages of masters: what is kept, how much an update counts, and models that hold the averages for a while."""
