"""jaxaccum: train detectors and point-completion networks with exact gradient accumulation.

The recipe decides the update; the geometry decides only its time and its memory.
"""

import os

from jaxaccum import xla_flags

__version__ = "0.1.0"

xla_flags.set_needed(os.environ)
