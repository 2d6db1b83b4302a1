"""Weights of the PyTorch reference in our layout."""
