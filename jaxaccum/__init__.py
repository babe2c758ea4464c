"""jaxaccum: train detectors and point-completion networks with exact gradient accumulation.

The recipe decides the update; the geometry decides only its time and its memory.
"""

import importlib
import os
import sys
from typing import Any

from jaxaccum import start
from jaxaccum.machine import host_memory, xla_flags

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # so it is while `python -m jaxaccum.VERB` imports this package
    host_memory.restart("jaxaccum")
    start.prepare()
    start.importing()

xla_flags.set_needed(os.environ)

_LATER = {"load": "api", "Model": "api"}  # what is slow to import comes when it is asked for


def __getattr__(name: str) -> Any:
    """`load` and `Model` of jaxaccum/api.py, and the module `train`, which can be called."""
    if name in _LATER:
        return getattr(importlib.import_module(f"jaxaccum.{_LATER[name]}"), name)
    if name == "train":
        return importlib.import_module("jaxaccum.train")
    raise AttributeError(f"module 'jaxaccum' has no attribute {name!r}")
