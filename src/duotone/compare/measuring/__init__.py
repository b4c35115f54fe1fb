"""What runs where a model is: training a few steps at a time, its times, and its memory."""
