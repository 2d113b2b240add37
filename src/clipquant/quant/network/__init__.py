"""A model that is run: its weights, its calibration, what its layers meet."""
