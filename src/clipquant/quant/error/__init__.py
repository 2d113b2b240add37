"""The error of a layer's outputs, and how codes lower it."""
