"""From text and images on disk to examples and batches; no JAX, so that it runs in the background of the devices."""
