"""Several ranks: what they agree on in a step, and models that are replicated or sharded over them."""
