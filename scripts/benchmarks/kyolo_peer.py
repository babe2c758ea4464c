"""The process that runs kyolo, on Keras's JAX or PyTorch: lines of JSON in, lines of JSON out.

KERAS_BACKEND=jax python kyolo_peer.py

kyolo (PyPI, Apache-2.0) is used as its users do: a detector compiled with an optimizer, and `fit`,
whose time is taken from outside. Nothing is compared but time: its loss and its assigner are its
own.
"""

from __future__ import annotations

import time
from typing import Any

import peer  # beside this file

ANSWERS = peer.answers()

import keras
import kyolo
import numpy as np
from kyolo import losses, models, training

cases: dict[str, Any] = {}


def make(case: str, model: str, file: str) -> dict[str, Any]:
    """A detector and a batch: image (N, S, S, 3) uint8, boxes (N, K, 4) pixels, classes, valid."""
    with np.load(file) as batch:
        images = batch["image"].astype(np.float32) / 255
        targets = {
            "boxes": batch["boxes"].astype(np.float32),
            "labels": batch["classes"].astype(np.int32),
            "mask": batch["valid"].astype(np.float32),
        }
        classes = int(batch["count"])
    network = getattr(models, model)(nc=classes, input_shape=images.shape[1:])
    loss = losses.YOLODetectionLoss(nc=classes, reg_max=16, strides=(8, 16, 32))
    detector = training.YOLODetector(network, loss=loss)
    detector.compile(optimizer=keras.optimizers.SGD(1e-4, momentum=0.9))
    cases[case] = detector, images, targets
    took(case, 1)
    return {
        "parameters": int(sum(np.prod(w.shape) for w in network.trainable_weights)),
        "versions": (
            f"kyolo {kyolo.__version__}, Keras {keras.__version__} on {keras.backend.backend()}"
        ),
    }


def took(case: str, steps: int) -> tuple[float, float]:
    """Mean seconds of so many steps of an epoch, and of processors."""
    detector, images, targets = cases[case]

    def batches():
        while True:
            yield images, targets

    start, cpu = time.perf_counter(), time.process_time()
    detector.fit(batches(), epochs=1, steps_per_epoch=steps, verbose=0)
    return (time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps


if __name__ == "__main__":
    DO = {"make": make, "time": took}
    peer.serve(lambda name, **options: DO[name](**options), ANSWERS)
