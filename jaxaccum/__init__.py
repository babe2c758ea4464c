"""jaxaccum: train detectors and point-completion networks with exact gradient accumulation.

The recipe decides the update; the geometry decides only its time and its memory.
"""

import os
import sys

from jaxaccum import start
from jaxaccum.machine import xla_flags

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # so it is while `python -m jaxaccum.VERB` imports this package
    start.prepare()

xla_flags.set_needed(os.environ)
