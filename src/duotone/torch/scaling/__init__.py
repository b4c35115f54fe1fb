"""Loss scaling on a device: the scaler, torch.amp's interface beside it, and how a run ends that only skips."""
