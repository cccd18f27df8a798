"""Memory: the store of what was met, and answers from it. Tensors of responses in, answers out; it knows no defence."""
