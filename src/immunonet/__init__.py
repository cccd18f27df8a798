"""An adaptive immune system for any trained PyTorch classifier."""
