"""Loss scaling: gradients of a scaled loss, what a step did, and the errors of a run that only skips."""
