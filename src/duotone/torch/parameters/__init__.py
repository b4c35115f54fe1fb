"""What Duotone keeps for each parameter: how it is stored, its FP32 master, and the part of it that is here."""
