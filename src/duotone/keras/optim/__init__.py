"""Optimizers around Keras' own: a loss scale, and FP32 masters of 16-bit variables."""
