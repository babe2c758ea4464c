"""The process that runs PyTorch: takes requests as lines of JSON, answers with lines of JSON.

python torch_peer.py FOLDER THREADS cpu|gpu     FOLDER: where PyTorch is installed; "" for anywhere

It makes cases, each a step on fixed data, checks them once, and times steps when asked to.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import peer  # beside this file

ANSWERS = peer.answers()
if sys.argv[1]:
    sys.path.append(sys.argv[1])  # last: numpy and the like are those of this Python
sys.path += [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

import torch


class Server:
    """Cases by name."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.cases: dict[str, Any] = {}

    def make(self, case: str, kind: str, **options: Any) -> Any:
        """Makes a case and returns what it says of itself."""
        from benchmarks import torch_completion, torch_points, torch_yolo

        kinds = {
            "yolo": torch_yolo.Training,
            "adapointr": torch_completion.Training,
            "points": torch_points.Operation,
        }
        self.cases[case] = kinds[kind](self.device, **options)
        return self.cases[case].facts()

    def time(self, case: str, steps: int) -> tuple[float, float]:
        """Mean seconds of so many steps, and of processors."""
        self._wait()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.cases[case].step()
        self._wait()
        return (time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps

    def result(self, case: str, path: str) -> None:
        """Writes what a case computes, to compare."""
        self.cases[case].write(path)

    def drop(self, case: str) -> None:
        del self.cases[case]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    threads, platform = int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    if platform == "gpu" and not torch.cuda.is_available():
        server: Any = None
    else:
        server = Server("cuda" if platform == "gpu" else "cpu")

    def do(name: str, **options: Any) -> Any:
        if server is None:
            raise RuntimeError("this PyTorch sees no GPU: install one that is built for CUDA")
        return getattr(server, name)(**options)

    peer.serve(do, ANSWERS)


if __name__ == "__main__":
    main()
