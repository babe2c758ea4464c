"""Stands for `python` where a documented command is run: the same, with the tests' tiny models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def main() -> None:
    if sys.argv[1] == "-m":
        module, sys.argv[:] = sys.argv[2], sys.argv[2:]
        run = lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)  # noqa: E731
    else:
        file, sys.argv[:] = sys.argv[1], sys.argv[1:]
        sys.path.insert(0, str(Path(file).parent))
        run = lambda: runpy.run_path(file, run_name="__main__")  # noqa: E731
    sys.path.append(str(TESTS))
    import tiny
    import tiny_completion

    assert tiny.yolo.FAMILIES["tiny"] and tiny_completion.completion.MODELS["adapointr-tiny"]
    run()


if __name__ == "__main__":
    main()
