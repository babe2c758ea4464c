"""Point completion: PoinTr or AdaPoinTr, its Chamfer terms, its samples and its metrics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import config as configs
from jaxaccum import data, draw_clouds
from jaxaccum.accumulate import Groups, Objective, Output, Term, sample_keys
from jaxaccum.data.cloud_sources import CroppedClouds, PairedClouds
from jaxaccum.data.stream import say_lost
from jaxaccum.losses.chamfer import chamfer_l1
from jaxaccum.metrics import completion as metrics
from jaxaccum.models import completion, points
from jaxaccum.tasks import captioned

PyTree = Any
SAMPLES = "samples"
# Of the jitter on the centres that AdaPoinTr learns to denoise: deviation, and largest value.
NOISE, NOISE_LIMIT = 0.01, 0.05


@dataclasses.dataclass(frozen=True)
class CompletionTask:
    """A completion network in training.

    A batch is a dict with a leading axis of samples: `partial` (2048, 3) and `complete` (P, 3)
    float32, `weight` () 1 for a real sample; `index` and `epoch` name the sample. With captions
    also `text` (T,) float32, the caption's vector, and `caption` () int32, its id.

    Attributes:
      model: the network.
      gains: of the terms coarse, fine, denoise.
      seed: of the noise.
      names: of the categories.
      alignment: of completed clouds with captions, a term of the loss; None for no such term.
    """

    unit: ClassVar[str] = "clouds"
    monitor: ClassVar[tuple[str, bool]] = ("cd_l1", False)

    model: Any
    gains: tuple[float, float, float] = (1.0, 1.0, 0.5)
    seed: int = 0
    names: tuple[str, ...] = ()
    alignment: captioned.Alignment | None = None

    @classmethod
    def open(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None = None
    ) -> Any:
        """The "train", "val" or "unseen" split that the config names, with its captions if any.

        Its categories may be others than `names`: a completion network does not know them.

        Raises:
          DataError, WeightsError, ConfigError: it, its captions, or what encodes these, cannot be
            used.
        """
        del names
        options = config.eval
        source = data.open_clouds(
            config.data.path, split, mode=options.mode, viewpoints=options.viewpoints or None,
            cache_bytes=int(config.data.cache_gib * 2**30) // max(config.data.workers, 1),
            # Runs of before it was there have no such field.
            on_error=config.data.get("on_error", "raise"), check=True,
        )  # fmt: skip
        return captioned.with_captions(source, config)

    @classmethod
    def create(
        cls, config: ml_collections.ConfigDict, names: Sequence[str], dtype: Any
    ) -> CompletionTask:
        """The task of a config.

        Raises:
          ConfigError: captions for a network that takes none.
        """
        name, width = config.text.encoder, 0
        if name:
            width = captioned.text_encoder(name).width
        try:
            model = completion.create(config.model, dtype, width).clone(remat=config.remat)
        except ValueError as error:
            raise configs.ConfigError(f"text.encoder: {error}") from None
        loss = config.loss
        return cls(
            model, (loss.coarse, loss.fine, loss.denoise), config.seed, tuple(names),
            captioned.Alignment.of(config, width, dtype),
        )  # fmt: skip

    def initialise(self, seed: int, dtype: Any = np.float32) -> tuple[PyTree, PyTree]:
        """Initial (params, stats), on the host; an encoder's frozen weights are random."""
        params, stats = completion.initialise(self.model, seed, dtype)
        if self.alignment is None:
            return params, stats
        more = self.alignment.initialise(seed, dtype)
        return {**params, **more[0]}, {**stats, **more[1]}

    def load_frozen(
        self, config: ml_collections.ConfigDict, stats: PyTree
    ) -> tuple[PyTree, list[str]]:
        """Statistics with the weights that are not trained, and lines about them.

        Raises:
          WeightsError: they cannot be used.
        """
        if self.alignment is None:
            return stats, []
        if config.text.point_weights:
            return self.alignment.load(config.text.point_weights, stats)
        return stats, [
            f"{config.text.point_encoder}: random weights, frozen (no text.point_weights): it "
            "tells clouds apart but has not learned what captions say"
        ]

    def objective(self, nbs: int, compat: bool = False) -> Objective:
        """Means over samples of the Chamfer distances (L1).

        Coarse and fine against the target, and what became of the jittered centres against the
        points of the target around them. PoinTr has no such centres.
        """
        del nbs
        names = ("coarse", "fine", "denoise")[: 3 if self.model.denoise_points else 2]
        terms = tuple(
            Term(name, gain, SAMPLES) for name, gain in zip(names, self.gains, strict=False)
        )
        coupled = () if self.alignment is None else (self.alignment.term(),)
        return Objective(terms, {SAMPLES: 1.0}, 1.0, compat, coupled)

    def forward(
        self, params: PyTree, stats: PyTree, batch: PyTree, groups: Groups | None
    ) -> Output:
        """Numerators, denominators and moments of a microbatch."""
        weight = batch["weight"]
        partial, target = self._coordinates(batch["partial"]), self._coordinates(batch["complete"])
        noise = self.noise(batch["epoch"], batch["index"], partial.dtype)
        clouds, changed = self.model.apply(
            _variables(params, stats), partial, groups, noise, batch.get("text"),
            mutable=["moments"],
        )  # fmt: skip
        distances = {
            "coarse": chamfer_l1(clouds.coarse, target),
            "fine": chamfer_l1(clouds.fine, target),
        }
        if noise is not None:
            near = points.nearest(clouds.centres, target, self.model.points_per_query)
            around = points.gather(target, near.reshape(len(near), -1))
            distances["denoise"] = chamfer_l1(clouds.denoised, around)
        numerators = {
            name: jnp.sum(jnp.where(weight > 0, weight * value, 0))
            for name, value in distances.items()
        }
        features = ()
        if self.alignment is not None:
            features = self.alignment.features(stats, clouds.fine, batch)
        return Output(numerators, {SAMPLES: jnp.sum(weight)}, changed.get("moments", {}), features)

    def noise(self, epoch: jax.Array, index: jax.Array, dtype: Any) -> jax.Array | None:
        """Jitter of the centres to denoise, (samples, denoise_points, 3), by sample and epoch."""
        count = self.model.denoise_points
        if not count:
            return None

        def one(key):
            return NOISE * jax.random.normal(key, (count, 3), jnp.float32)

        jitter = jax.vmap(one)(sample_keys(self.seed, epoch, index))
        return jnp.clip(jitter, -NOISE_LIMIT, NOISE_LIMIT).astype(dtype)

    def predict(
        self, params: PyTree, stats: PyTree, partial: jax.Array, text: jax.Array | None = None
    ) -> jax.Array:
        """The completed clouds (N, P, 3) of partial ones (N, 2048, 3).

        Args:
          text: (N, T) vectors of captions; None for the network without them.
        """
        xyz = self._coordinates(partial)
        return self.model.apply(_variables(params, stats), xyz, text=text).fine

    def predict_and_embed(self, params: PyTree, stats: PyTree, batch: PyTree):
        """Completed clouds (N, P, 3), and where captions are aligned vectors of these and of the
        true ones."""
        clouds = self.predict(params, stats, batch["partial"], batch.get("text"))
        if self.alignment is None:
            return clouds, None
        return clouds, [self.alignment.embed(stats, c) for c in (clouds, batch["complete"])]

    def _coordinates(self, cloud):
        """Coordinates keep at least float32, whatever the features are computed in."""
        return cloud.astype(jnp.promote_types(self.model.dtype, jnp.float32))

    def untrained(self, path: str) -> bool:
        """Whether the loss does not depend on a parameter."""
        return completion.untrained(self.model.model, path, bool(self.model.text_width))

    def example(self, samples: int) -> PyTree:
        """Shapes of a batch."""

        def shape(*dims, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((samples, *dims), dtype)

        arrays = {
            "partial": shape(self.model.num_input, 3),
            "complete": shape(self.model.num_points, 3),
            "weight": shape(),
            "index": shape(dtype=jnp.int32),
            "epoch": shape(dtype=jnp.int32),
        }
        if self.model.text_width:
            arrays |= {"text": shape(self.model.text_width), "caption": shape(dtype=jnp.int32)}
        return arrays

    def evaluation(self, samples: int) -> tuple[Callable[..., PyTree], tuple[Any, ...]]:
        """What an evaluation computes on the device, and the shapes of a batch of it."""
        return self.predict_and_embed, (self.example(samples),)

    def stream(
        self,
        config: ml_collections.ConfigDict,
        source: data.CloudSource,
        samples: int,
        plain: bool = False,
    ) -> data.CloudStream:
        """The samples of a run; not mirrored if `plain`."""
        del samples
        mirror = config.augment.mirror and not plain
        clouds, texts = captioned.parts(source)
        return data.CloudStream(
            clouds, seed=config.seed, mirror=mirror, texts=texts,
            on_error=config.data.get("on_error", "raise"),
        )  # fmt: skip

    def facts(self, source: data.CloudSource) -> dict[str, Any]:
        """The frame of the clouds that the network knows."""
        return {"normalised": source.normalised}

    def notes(
        self, config: ml_collections.ConfigDict, source: data.CloudSource, samples: int
    ) -> list[str]:
        """Lines to print at the start of a run of `samples` of a source.

        Raises:
          ConfigError: the model predicts other clouds than the source holds.
        """
        del samples
        # PoinTr's points include those of its input; small models predict fewer than there are.
        fine, target = self.model.num_points, source.points
        if fine > target:
            raise configs.ConfigError(
                f"{config.model} predicts {fine} points, the complete clouds of "
                f"{source.report.where} have {target}: it is made for another data set"
            )
        frame = "mean at 0, largest radius 1" if source.normalised else "as they lie on disk"
        return [f"clouds of {target} points ({frame}), {fine} predicted"]

    def evaluator(self, config: ml_collections.ConfigDict, source: data.CloudSource) -> Evaluator:
        """Chamfer distances and F-Score on a source, and on the unseen categories if asked for."""
        sources = {"": source}
        if config.eval.unseen and not data.has_unseen(config.data.path):
            raise configs.ConfigError(
                f"eval.unseen: {config.data.path} has no categories that training does not see; "
                "set eval.unseen=False"
            )
        if config.eval.unseen:
            sources["unseen/"] = self.open(config, "unseen")
        lenient = config.data.get("on_error", "raise") == "skip"
        return Evaluator(self, sources, config.eval.batch, references(config), lenient)

    def full_evaluator(self, config: ml_collections.ConfigDict) -> tuple[Evaluator, list[str]]:
        """The test split, and the unseen categories where there are some; what is cropped by us in
        all three modes, and over these the mean."""
        config = config.copy_and_resolve_references()
        config.eval.viewpoints = 0  # as the benchmark has it
        sources, lines = {}, []
        for prefix, split in (("", "test"), ("unseen/", "unseen")):
            if split == "unseen" and not data.has_unseen(config.data.path):
                continue
            source = self.open(config, split)
            lines += source.report.lines()
            if not source.points and not config.eval.references:
                lines.append("  no MMD: it needs cars to compare with, --references=PCN_FOLDER")
            if not isinstance(captioned.parts(source)[0], CroppedClouds):
                sources[prefix] = source
                continue
            for mode in ("easy", "median", "hard"):
                config.eval.mode = mode
                sources[f"{prefix}{mode}/"] = self.open(config, split)
        lenient = config.data.get("on_error", "raise") == "skip"
        return Evaluator(self, sources, config.eval.batch, references(config), lenient), lines

    def summary(self, best: dict[str, Any]) -> str:
        """The metrics of an evaluation in a few words."""
        unseen = f", unseen {best['unseen/cd_l1']:.3f}" if "unseen/cd_l1" in best else ""
        return (
            f"CD-L1 {best['cd_l1']:.3f}{unseen}, CD-L2 {best['cd_l2']:.3f} (x 1000), "
            f"F-Score {best['f_score']:.4f}"
        )

    def tables(self, found: dict[str, float]) -> list[str]:
        """None."""
        del found
        return []

    def readable(self, record: dict[str, Any]) -> dict[str, float]:
        """CD-L1 x 1000 of every Chamfer term, without its gain."""
        gains = zip(("coarse", "fine", "denoise"), self.gains, strict=True)
        return {
            f"cd_l1/{name}": 1000 * record[f"loss/{name}"] / gain
            for name, gain in gains
            if gain and f"loss/{name}" in record
        }


class Evaluator:
    """Metrics of a completion network on sources, as a function of its weights.

    The padded samples of the last batch are not counted. Results do not depend on the batch.
    """

    def __init__(
        self,
        task: CompletionTask,
        sources: dict[str, data.CloudSource],
        batch: int,
        cars: Callable[[], Iterator[np.ndarray]] | None = None,
        lenient: bool = False,
    ):
        """Args:
        task: the model.
        sources: prefix of the metrics' names -> what to evaluate on.
        batch: clouds to predict at once.
        cars: complete clouds to compare predictions of real scans with, which have no target.
        lenient: leave out samples that cannot be read, and say so.
        """
        self.task, self.sources, self.batch, self.cars = task, sources, batch, cars
        self._lenient = lenient
        self._predict = jax.jit(task.predict_and_embed)

    def __call__(
        self, params: PyTree, stats: PyTree, pictures: int = 0
    ) -> tuple[dict[str, float], list[np.ndarray]]:
        """Metrics, with each source's prefix, and `pictures` drawings from each.

        Modes of one set ("easy/", "median/", "hard/") are followed by their mean, as published.
        """
        # One device evaluates; weights that lie on all of them would have each do all of it.
        params, stats = jax.device_put((params, stats), jax.local_devices()[0])
        found: dict[str, float] = {}
        drawn: list[np.ndarray] = []
        for prefix, source in self.sources.items():
            result: Any = (
                metrics.CompletionMetrics(source.names)
                if source.points
                else metrics.ScanMetrics(self.cars)
            )
            # Spread over the source, which lists one category after the other.
            shown = set(np.linspace(0, len(source) - 1, pictures).astype(int).tolist())
            pending: Callable[[], None] | None = None
            with ThreadPoolExecutor() as pool:
                clouds, texts = captioned.parts(source)
                vectors: list[Any] = []
                lost: list[str] | None = [] if self._lenient else None
                for batch in data.cloud_batches(clouds, batch=self.batch, texts=texts, lost=lost):
                    output, embedded = self._predict(params, stats, batch)
                    if embedded is not None:
                        vectors.append((batch["weight"] > 0, batch["caption"], *embedded))
                    if pending is not None:  # the host measures while the device is on the next
                        pending()
                    pending = functools.partial(
                        self._score, pool, prefix, source, batch, output, result, drawn, shown
                    )
                if pending is not None:
                    pending()
            say_lost(lost or [], len(source), f"samples of {source.report.where}")
            scores = result.compute()
            if texts is not None and vectors:
                real, *found_ = (np.concatenate(v) for v in zip(*vectors, strict=True))
                ids, ours, true = (a[real] for a in found_)
                scores |= captioned.retrieval(ours, ids, texts.vectors)
                best = captioned.retrieval(true, ids, texts.vectors)
                scores["retrieval_of_truth"] = best["retrieval"]
            found |= {f"{prefix}{k}": v for k, v in scores.items()}
        return _means_over_modes(found) | found, drawn

    def _score(self, pool, prefix, source, batch, output, result, drawn, shown):
        predicted = np.asarray(output, np.float32)
        real = np.flatnonzero(batch["weight"] > 0)
        indices = [int(i) for i in batch["index"][real]]
        partial, target = batch["partial"][real], batch["complete"][real]
        if source.points:
            result.add_clouds(
                [source.category(i) for i in indices], [source.name(i) for i in indices],
                predicted[real], target, pool,
            )  # fmt: skip
        else:
            names = [source.name(i) for i in indices]
            result.add_clouds(names, partial, predicted[real], pool)
        for row, index in enumerate(indices):
            if index in shown and np.isfinite(predicted[real[row]]).all():
                drawn.append(
                    draw_clouds.draw_completion(
                        partial[row], predicted[real[row]], target[row] if source.points else None,
                        title=prefix.replace("/", " ") + source.names[source.category(index)],
                    )
                )  # fmt: skip


def _variables(params: PyTree, stats: PyTree) -> PyTree:
    """What the network takes, without what belongs to the alignment."""
    return {
        group: {k: v for k, v in tree.items() if k != captioned.MODULE}
        for group, tree in (("params", params), ("batch_stats", stats))
    }


def _means_over_modes(found: dict[str, float]) -> dict[str, float]:
    """Metrics that exist for the modes easy, median and hard, averaged over them."""
    means = {}
    for name in found:
        before, middle, after = name.partition("easy/")
        if middle and not after.startswith("samples") and after != "categories":
            modes = [found[f"{before}{mode}/{after}"] for mode in ("easy", "median", "hard")]
            means[before + after] = float(np.mean(modes))
    return means


def references(config: ml_collections.ConfigDict) -> Callable[[], Iterator[np.ndarray]] | None:
    """The cars of `eval.references`, a PCN folder, all splits, to be read one after the other.

    Raises:
      DataError: it cannot be used, or holds no cars.
    """
    path = config.eval.references
    if not path:
        return None
    opened = [data.open_clouds(path, split) for split in ("train", "val", "test")]
    sources = [s for s in opened if isinstance(s, PairedClouds) and "car" in s.names]
    if not sources:
        raise data.DataError(f"{path}: no complete clouds of the category 'car' on disk", file=path)

    def cars():
        for source in sources:
            for i in range(len(source)):
                if source.names[source.category(i)] == "car":
                    yield source.complete(i)

    return cars
