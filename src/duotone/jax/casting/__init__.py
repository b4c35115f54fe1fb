"""Autocast: a function's program, run under the rules of a policy."""
