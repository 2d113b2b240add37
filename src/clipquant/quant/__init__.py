"""Weights in, codes out: grids, methods and packing, as pure functions."""
