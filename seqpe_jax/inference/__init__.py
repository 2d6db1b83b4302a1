"""What is compiled of a model under a mesh when it is not trained: signals, vectors, evaluation, generation."""
