"""Use of a trained model under a mesh: signals, vectors, logits, evaluation steps, generation, exports."""
