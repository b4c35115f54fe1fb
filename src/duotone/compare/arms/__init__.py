"""Ways of training, each behind the same three parts of a step."""
