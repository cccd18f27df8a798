"""Features: names of layers, the maps from cells to features, and the search among them."""
