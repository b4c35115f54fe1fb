"""FP32 masters around any Optax optimizer, its state, and the updates that it returns."""
