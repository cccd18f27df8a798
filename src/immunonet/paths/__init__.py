"""Paths of weights between networks of one architecture: where a point lies on them, and its batch statistics."""
