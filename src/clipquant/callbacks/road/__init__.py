"""The one way user code is run aside: through a nested Trainer, on one guest, without a trace."""
