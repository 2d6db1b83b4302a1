"""SeqPE in JAX: position encodings that train short and work long."""
