"""Controls that bring states back to the manifolds of clean ones: tensors in, tensors out."""
