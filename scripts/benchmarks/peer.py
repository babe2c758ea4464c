"""How a process that is timed from outside is talked to: requests and answers as lines of JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO


def answers() -> TextIO:
    """Where answers go; what others print goes to stderr from here on."""
    file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return file


def serve(do: Callable[..., Any], to: TextIO) -> None:
    """Answers requests until there are none: do(name, **options), or the traceback."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": do(request["do"], **request["options"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        to.write(json.dumps(answer) + "\n")
        to.flush()
