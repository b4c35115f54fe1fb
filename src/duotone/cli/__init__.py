"""The command line: one file per verb, on top of everything else."""
