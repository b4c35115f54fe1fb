"""16-bit variables and what they lack to be their FP32 masters."""
