"""Numbers about a trained model, and their tables and plots."""
