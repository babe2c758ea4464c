"""Metrics: what an evaluation reports, computed on the host in numpy, apart from any model."""
