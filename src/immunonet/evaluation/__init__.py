"""How robust a classifier is, measured honestly."""
