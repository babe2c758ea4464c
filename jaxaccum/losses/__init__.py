"""Numerators and denominators of the losses. Knows no model and no data set."""
