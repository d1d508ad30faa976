"""Arithmetic on tensors that knows no group and no model: magnitudes, factors, products."""
