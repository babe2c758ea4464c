"""Clouds of files completed: written, drawn, and told as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxaccum import data
from jaxaccum.data import texts
from jaxaccum.draw import boxes as draw
from jaxaccum.draw import clouds as draw_clouds
from jaxaccum.fields import ConfigError
from jaxaccum.tasks import files
from jaxaccum.tasks.base import Trained
from jaxaccum.tasks.completion import captioned

CLOUDS = (".npy", ".pcd", ".ply")


def complete(
    trained: Trained,
    source: Path,
    out: Path,
    format: str = "ply",
    normalise: bool | None = None,
    caption: str = "",
    failed: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Completes clouds, writes and draws them.

    Args:
      trained: a completion network.
      source: a cloud, or a folder of them.
      out: folder for a cloud and a picture of each, and completions.json.
      format: of the clouds, "ply" or "npy".
      normalise: bring every cloud to the frame of ShapeNet's (mean at the origin, largest radius
        1) before, and what is predicted back after; None does as in the training.
      caption: of what is in the clouds, for a network that takes captions; "" for none.
      failed: takes a message for every file that could not be used.
    Returns:
      per cloud {"file", "points", "written", "normalised"}.
    Raises:
      ConfigError: a caption for a network that takes none.
    """
    task = trained.task
    text = _vector(trained, caption)
    paths = files.find_files(source, CLOUDS)
    if normalise is None:
        normalise = bool(trained.facts["normalised"])
    written_to = files.targets_of(out, paths)
    files.spare(
        paths, (f"{t}{suffix}" for t in written_to.values() for suffix in (f".{format}", ".png"))
    )
    forward = jax.jit(task.predict)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    unreadable = [] if failed is None else failed
    for path in files.counted(paths):
        try:
            cloud = data.read_cloud(path, drop_invalid=True)
        # Whatever a reader makes of a damaged file, the next one is another.
        except Exception as error:
            unreadable.append(files.why(path, error))
            continue
        radius = float(np.linalg.norm(cloud, axis=1).max())
        if not normalise and radius > 2:
            print(
                f"{path.name}: reaches {radius:.3g} from the origin, far beyond the clouds that "
                "the network knows; bring it to their frame, or try --normalise=yes"
            )
        partial, pose = data.prepare_partial(cloud, normalise)
        predicted = pose.restore(
            np.asarray(forward(trained.params, trained.stats, partial[None], text))[0]
        )
        if not np.isfinite(predicted).all():
            unreadable.append(f"{texts.shown_path(path)}: the network's prediction is not finite")
            continue
        target = written_to[path]
        written = target.with_name(f"{target.name}.{format}")
        data.write_cloud(written, predicted)
        draw.save_image(
            target.with_name(f"{target.name}.png"), draw_clouds.draw_completion(cloud, predicted)
        )
        results.append(
            {
                "file": path.name,
                "points": len(cloud),
                "written": written.name,
                "normalised": normalise,
            }
        )
    files.report(unreadable, results, source)
    (out / "completions.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def _vector(trained: Trained, caption: str) -> jax.Array | None:
    """The vector (1, T) of a caption; None for none."""
    encoder = trained.config.text.encoder
    if caption and not encoder:
        raise ConfigError("--caption: these weights were learned without captions")
    if not caption:
        if encoder:
            print(
                "no --caption: queries are made without one, by a layer that this run's captions "
                "have not trained"
            )
        return None
    return captioned.vectors_of(encoder, caption, 1)


def lines(results: list[dict[str, Any]]) -> list[str]:
    """What was completed, in words."""
    found = []
    for result in results:
        frame = "ShapeNet's frame" if result["normalised"] else "its own frame"
        found.append(
            f"{result['file']}: {result['points']} points, taken in {frame}, "
            f"completed in {result['written']}"
        )
    return found
