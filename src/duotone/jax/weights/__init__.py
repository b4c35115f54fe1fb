"""Weights in 16 bits: the split codec of masters, casting parameters, and getting masters back."""
