"""Weights that are trained as they will be stored: on grids that are learned, and with masks."""
