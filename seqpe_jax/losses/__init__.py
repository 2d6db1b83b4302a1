"""Loss functions: task losses, losses on position vectors, and the training loss that adds them up."""
