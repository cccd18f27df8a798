"""The immune stages: pure functions on tensors, batched over antigens, one module each."""
