"""A model as a folder that runs with JAX alone: how it is written, what is in it, what its card says."""
