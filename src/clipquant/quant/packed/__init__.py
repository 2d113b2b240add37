"""Weights that stay packed in memory."""
