"""Text and images on disk -> examples -> batches. No JAX, so that it runs before and beside the devices."""
