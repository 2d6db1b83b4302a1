"""Text on disk -> tokens -> batches. NumPy and TFDS only; no JAX, so that it runs before and beside the devices."""
