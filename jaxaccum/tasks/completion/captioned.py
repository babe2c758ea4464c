"""Captions in point completion: clouds with captions, and the term that aligns the two.

A frozen encoder turns completed clouds into vectors, which are contrasted with those of the
captions over the whole effective batch: every cloud shall be nearer to its own caption than to
those of the others. Xue et al. 2023, arXiv:2212.05171 (ULIP).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import data
from jaxaccum.accumulate import Coupled
from jaxaccum.data.captions import TextEncoder, Texts
from jaxaccum.fields import ConfigError
from jaxaccum.losses import alignment
from jaxaccum.machine import user_cache
from jaxaccum.models import pointbert, text
from jaxaccum.weights import torch_file
from jaxaccum.weights.transfer import WeightsError

PyTree = Any
MODULE = "ulip_loss_module"  # of parameters and of statistics, as in the original's checkpoints
ALIGN = "align"


@dataclasses.dataclass
class _Report(data.CloudReport):
    captions: tuple[str, ...] = ()

    def lines(self, examples: int = 3) -> list[str]:
        return [*super().lines(examples), *self.captions]


@dataclasses.dataclass(frozen=True)
class CaptionedClouds:
    """A source of clouds with the captions of its samples; else as the source."""

    clouds: data.CloudSource
    texts: Texts

    @property
    def names(self) -> tuple[str, ...]:
        return self.clouds.names

    @property
    def identity(self) -> str:
        both = f"{self.clouds.identity}\0{self.texts.identity}"
        return hashlib.sha256(both.encode()).hexdigest()[:12]

    @property
    def report(self) -> data.CloudReport:
        return _Report(**vars(self.clouds.report), captions=self.texts.report)

    @property
    def points(self) -> int:
        return self.clouds.points

    @property
    def normalised(self) -> bool:
        return self.clouds.normalised

    @property
    def stamps(self) -> data.Stamps:
        """Of the files of the clouds, see `data.cloud_check`."""
        return getattr(self.clouds, "stamps", {})

    def __len__(self) -> int:
        return len(self.clouds)

    def category(self, index: int) -> int:
        return self.clouds.category(index)

    def name(self, index: int) -> str:
        return self.clouds.name(index)

    def sample(self, index: int, rng: np.random.Generator | None):
        return self.clouds.sample(index, rng)


def with_captions(source: data.CloudSource, config: ml_collections.ConfigDict) -> Any:
    """The source with the captions that the config asks for; as it is if it asks for none.

    Raises:
      DataError, WeightsError: the captions or their encoder cannot be used.
    """
    if not config.text.encoder:
        return source
    encoder = text_encoder(config.text.encoder)
    texts = Texts.of(
        source, config.text.captions or None, encoder, cache_folder(), config.text.compat
    )
    return CaptionedClouds(source, texts)


def parts(source: Any) -> tuple[data.CloudSource, Texts | None]:
    """A source without its captions, and these if it has some."""
    if isinstance(source, CaptionedClouds):
        return source.clouds, source.texts
    return source, None


@functools.lru_cache(maxsize=2)
def text_encoder(name: str) -> TextEncoder:
    """The encoder of that name.

    Raises:
      ConfigError: there is none.
    """
    try:
        return text.encoder(name)
    except (ValueError, ImportError) as error:
        if isinstance(error, WeightsError):
            raise
        raise ConfigError(f"text.encoder: {error}") from None


def cache_folder() -> Path:
    """Where vectors of captions are kept."""
    return user_cache.folder() / "text"


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The term that aligns completed clouds with their captions.

    Its frozen weights live among the statistics, which no gradient reaches; its temperature, the
    only thing it learns, among the parameters.

    Attributes:
      encoder: of clouds. width: of the vectors of captions.
      gain: of the term.
      temperature: that cosines are divided by at the start.
      compat: samples of one caption are each other's negatives, as in the original.
    """

    encoder: pointbert.PointBert
    width: int
    gain: float
    temperature: float
    compat: bool = False

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, width: int, dtype: Any) -> Alignment | None:
        """The term that the config asks for, if any."""
        options = config.text
        if not options.point_encoder:
            return None
        model = pointbert.PointBert(
            pointbert.table_of(options.point_encoder), dtype, remat=config.remat == "blocks"
        )
        return cls(model, width, config.loss.align, options.temperature, options.compat)

    def initialise(self, seed: int, dtype: Any) -> tuple[PyTree, PyTree]:
        """Its parts of the initial (params, stats); the encoder is random until weights come."""
        weights = pointbert.initialise(self.encoder.table, seed, self.width, dtype)
        scale = np.asarray(-np.log(self.temperature), dtype)
        return {MODULE: {"logit_scale": scale}}, {MODULE: _laid(weights)}

    def load(self, path: str, stats: PyTree) -> tuple[PyTree, list[str]]:
        """Statistics with the encoder of a file, and what was loaded.

        Raises:
          WeightsError: it does not hold this encoder, or one for other captions.
        """
        if not Path(path).is_file():
            raise WeightsError(f"text.point_weights: there is no file {path}")
        name = next(n for n, t in pointbert.MODELS.items() if t == self.encoder.table)
        loaded = pointbert.without_colour(pointbert.load(torch_file.read(Path(path)), name))
        width = loaded.weights.projection.shape[1]
        if width != self.width:
            raise WeightsError(
                f"text.point_weights: {path} compares clouds with vectors of {width}, those of "
                f"the captions have {self.width}: it was made for another text encoder"
            )
        return {**stats, MODULE: _laid(loaded.weights)}, loaded.lines

    def embed(self, stats: PyTree, clouds: jax.Array) -> jax.Array:
        """Vectors (N, width) of clouds (N, P, 3)."""
        tree = dict(stats[MODULE])
        projection = tree.pop("pc_projection")
        params, own = _parted(tree["ulip_encoder"])
        frozen = pointbert.Frozen(params, own, projection)
        return pointbert.embed(self.encoder, jax.lax.stop_gradient(frozen), clouds)

    def features(self, stats: PyTree, clouds: jax.Array, batch: PyTree) -> PyTree:
        """What the term looks at."""
        vectors = self.embed(stats, clouds)
        return {
            "cloud": vectors,
            "text": batch["text"].astype(vectors.dtype),
            "caption": batch["caption"].astype(vectors.dtype),  # exact up to 2^24
        }

    def term(self) -> Coupled:
        """InfoNCE over the effective batch, watched by how often a cloud finds its caption."""

        def of(features):
            captions = None if self.compat else features["caption"]
            return features["cloud"], features["text"], captions

        def loss(params, features, weight):
            clouds, texts, captions = of(features)
            scale = params[MODULE]["logit_scale"].astype(clouds.dtype)
            return alignment.info_nce(clouds, texts, scale, weight, captions)

        def accuracy(params, features, weight):
            del params
            clouds, texts, captions = of(features)
            return alignment.accuracy(clouds, texts, weight, captions)

        return Coupled(ALIGN, self.gain, loss, {"align_accuracy": accuracy})


def retrieval(vectors: np.ndarray, ids: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """How often a cloud finds its caption among all different ones of its data set.

    Args:
      vectors: (n, D) of clouds. ids: (n,) of their captions. texts: (captions, D).
    Returns:
      shares with the right caption first ("retrieval") and among the first five ("retrieval5"),
      and what guessing gives ("retrieval_chance").
    """

    def unit(a):
        a = np.asarray(a, np.float64)
        return a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)

    cosines = unit(vectors) @ unit(texts).T
    own = cosines[np.arange(len(ids)), ids]
    better = np.sum(cosines > own[:, None], axis=1)
    return {
        "retrieval": float(np.mean(better < 1)),
        "retrieval5": float(np.mean(better < 5)),
        "retrieval_chance": 1 / len(texts),
    }


def _laid(weights: pointbert.Frozen) -> PyTree:
    """One tree of parameters and statistics, under the names of the original's checkpoints."""

    def merged(a: Mapping, b: Mapping) -> dict:
        both = {**a, **b}
        return {k: merged(a[k], b[k]) if k in a and k in b else both[k] for k in both}

    return {
        "ulip_encoder": merged(weights.params, weights.stats),
        "pc_projection": weights.projection,
    }


def _parted(tree: Mapping) -> tuple[PyTree, PyTree]:
    """Parameters and statistics of a tree that holds both."""
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            own, more = _parted(value)
            params |= {key: own} if own else {}
            stats |= {key: more} if more else {}
        else:
            (stats if key in ("mean", "var") else params)[key] = value
    return params, stats


def vectors_of(encoder: str, caption: str, count: int) -> jax.Array:
    """The vector of a caption, for `count` clouds."""
    return jnp.tile(text_encoder(encoder).encode([caption]), (count, 1))
