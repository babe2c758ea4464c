"""jaxaccum: train detectors and point-completion networks with exact gradient accumulation.

The recipe decides the update; the geometry decides only its time and its memory.
"""

__version__ = "0.1.0"
