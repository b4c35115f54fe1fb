"""What Duotone knows about each parameter: how it is stored, its FP32 master, and which part of it this rank has."""
