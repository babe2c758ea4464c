"""Comparisons of models: what `python -m jaxaccum.compare` plans, trains and reports."""
