"""Bits of its own for each row of a weight."""
