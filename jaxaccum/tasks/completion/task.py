"""Point completion: PoinTr or AdaPoinTr, its Chamfer terms, its samples and its metrics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxaccum import data
from jaxaccum.accumulate import Groups, Objective, Output, Term, sample_keys
from jaxaccum.data.cloud_ops import NUM_INPUT
from jaxaccum.data.cloud_sources import CroppedClouds
from jaxaccum.data.formats.cloud_files import SUFFIXES
from jaxaccum.draw import clouds as draw_clouds
from jaxaccum.draw import figures
from jaxaccum.fields import ConfigError, Fields
from jaxaccum.losses.chamfer import chamfer_l1
from jaxaccum.metrics import completion as metrics
from jaxaccum.models import completion, points
from jaxaccum.tasks.base import Adopted, Interface, PackedSplit, Task, Trained
from jaxaccum.tasks.completion import captioned, pack, predict
from jaxaccum.tasks.completion.evaluator import Evaluator, references
from jaxaccum.tasks.completion.fields import FIELDS
from jaxaccum.tasks.results import Predictor, Sample
from jaxaccum.weights.transfer import Weights, WeightsError

PyTree = Any
SAMPLES = "samples"
# Of the jitter on the centres that AdaPoinTr learns to denoise: deviation, and largest value.
NOISE, NOISE_LIMIT = 0.01, 0.05


@dataclasses.dataclass(frozen=True)
class CompletionTask(Task):
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

    name: ClassVar[str] = "completion"
    fields: ClassVar[Fields] = FIELDS
    unit: ClassVar[str] = "clouds"
    monitor: ClassVar[tuple[str, bool]] = ("cd_l1", False)
    predict_flags: ClassVar[tuple[str, ...]] = ("format", "normalise", "caption", "up")
    suffixes: ClassVar[frozenset[str]] = SUFFIXES
    results: ClassVar[str] = "completions.json"
    loss_modules: ClassVar[tuple[str, ...]] = (captioned.MODULE,)

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
            model = completion.create(config.model, dtype, width).clone(
                remat=config.remat == "blocks"
            )
        except ValueError as error:
            raise ConfigError(f"text.encoder: {error}") from None
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

    def objective(self, nbs: int) -> Objective:
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
        return Objective(terms, {SAMPLES: 1.0}, coupled=coupled)

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

    def predict(self, params: PyTree, stats: PyTree, *inputs: jax.Array | None) -> jax.Array:
        """The completed clouds (N, P, 3) of partial ones (N, 2048, 3).

        Args:
          inputs: the partial clouds; and (N, T) vectors of captions, none or None for the network
            without them.
        """
        partial, text = (*inputs, None)[:2]
        xyz = self._coordinates(partial)
        return self.model.apply(_variables(params, stats), xyz, text=text).fine

    def input_size(self) -> str:
        """Points of a partial cloud, in words."""
        return f"{NUM_INPUT:,} points"

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
            raise ConfigError(
                f"{config.model} predicts {fine} points, the complete clouds of "
                f"{source.report.where} have {target}: it is made for another data set"
            )
        frame = "mean at 0, largest radius 1" if source.normalised else "as they lie on disk"
        return [f"clouds of {target} points ({frame}), {fine} predicted"]

    def evaluator(self, config: ml_collections.ConfigDict, source: data.CloudSource) -> Evaluator:
        """Chamfer distances and F-Score on a source, and on the unseen categories if asked for."""
        sources = {"": source}
        there = data.has_unseen(config.data.path)
        if config.eval.unseen is True and not there:
            raise ConfigError(
                f"eval.unseen: {config.data.path} has no categories that training does not see; "
                "set eval.unseen=False"
            )
        if config.eval.unseen and there:
            sources["unseen/"] = self.open(config, "unseen")
        lenient = config.data.get("on_error", "raise") == "skip"
        return Evaluator(self, sources, config.eval.batch, references(config), lenient)

    def full_evaluator(
        self, config: ml_collections.ConfigDict, split: str = ""
    ) -> tuple[Evaluator, list[str]]:
        """The test split, and the unseen categories where there are some, or another split; what is
        cropped by us in all three modes, and over these the mean."""
        config = config.copy_and_resolve_references()
        config.eval.viewpoints = 0  # as the benchmark has it
        sources, lines = {}, []
        splits = {"": split or "test"}
        if not split and data.has_unseen(config.data.path):
            splits["unseen/"] = "unseen"
        for prefix, chosen in splits.items():
            source = self.open(config, chosen)
            lines += source.report.lines()
            if not source.points and not config.eval.references:
                lines.append("  no MMD: it needs cars to compare with, --references=PCN_FOLDER")
            if not isinstance(captioned.parts(source)[0], CroppedClouds):
                sources[prefix] = source
                continue
            for mode in ("easy", "median", "hard"):
                config.eval.mode = mode
                sources[f"{prefix}{mode}/"] = self.open(config, chosen)
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
        """Distances by category, of each split and mode."""
        return metrics.tables(found)

    def readable(self, record: dict[str, Any]) -> dict[str, float]:
        """CD-L1 x 1000 of every Chamfer term, without its gain."""
        gains = zip(("coarse", "fine", "denoise"), self.gains, strict=True)
        return {
            f"cd_l1/{name}": 1000 * record[f"loss/{name}"] / gain
            for name, gain in gains
            if gain and f"loss/{name}" in record
        }

    def read_file(self, path: Path) -> Iterator[Sample]:
        """A cloud."""
        return predict.read_cloud(path)

    def drawn_samples(self, source: Any, batch: Any, count: int) -> list[np.ndarray]:
        """Partial clouds beside the complete ones that are to be found."""
        clouds, _ = captioned.parts(source)
        return [
            draw_clouds.draw_completion(
                batch["partial"][i], None, batch["complete"][i],
                title=clouds.names[clouds.category(int(batch["index"][i]))],
            )
            for i in np.flatnonzero(np.asarray(batch["weight"]) > 0)[:count]
        ]  # fmt: skip

    def drawn_source(self, source: Any) -> dict[str, np.ndarray]:
        """How many clouds of which category."""
        clouds, _ = captioned.parts(source)
        counts = Counter(clouds.category(i) for i in range(len(clouds)))
        named = {name: counts[i] for i, name in enumerate(clouds.names)}
        return {"labels": figures.bars(named, f"{len(clouds)} clouds")}

    def sample(self, value: Any) -> Sample:
        """A cloud in memory."""
        return predict.cloud_of(value)

    def writes(self, **options: Any) -> tuple[str, ...]:
        """A picture and a cloud."""
        return (".png", f".{options.get('format', 'ply')}")

    def predictor(self, trained: Trained, **options: Any) -> Predictor:
        """Completes one cloud; see `completion.predict.predictor`."""
        return predict.predictor(trained, **options)

    def interface(self, trained: Trained) -> Interface:
        """Partial clouds, and vectors of captions if it takes them, to complete ones."""
        points, captions = self.model.num_input, ""
        inputs = [jax.ShapeDtypeStruct((points, 3), jnp.float32)]
        as_trained = "mean at the origin, largest radius 1", "as they are"
        frame = as_trained[0 if trained.facts["normalised"] else 1]
        if width := self.model.text_width:
            inputs.append(jax.ShapeDtypeStruct((width,), jnp.float32))
            captions = f"; vectors (N, {width}) of captions by {trained.config.text.encoder}"
        facts = {
            "input": f"partial clouds (N, {points}, 3) float32, {frame}{captions}",
            "output": f"complete clouds (N, {self.model.num_points}, 3), in the same frame",
        }
        names = ["partial", "captions"][: len(inputs)], ["complete"]
        return Interface(inputs, facts, names)

    @classmethod
    def adopt(cls, found: Weights, name: str, names: Sequence[str], source: Path) -> Adopted:
        """A completion network of another program, and the frame of its clouds."""
        del found, source
        if names:
            raise WeightsError(f"--names: {name} knows no classes")
        config = cls.fields.defaults()
        config.model = name
        # Networks of ShapeNet-55 and -34 see clouds with mean 0 and radius 1, the others as is.
        normalised = name.endswith("-shapenet")
        frame = "mean 0, radius 1" if normalised else "as in its data set"
        return Adopted(config, (), {"normalised": normalised}, f"clouds: {frame}")

    @classmethod
    def packed_splits(cls, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """Also test, and unseen where there is one."""
        unseen = ("unseen",) if data.has_unseen(config.data.path) else ()
        return ("train", "val", "test", *unseen)

    @classmethod
    def open_to_pack(
        cls, config: ml_collections.ConfigDict, split: str, names: Sequence[str] | None
    ) -> Any:
        """A split without captions: these are made of what is packed, by any encoder."""
        config = config.copy_and_resolve_references()
        config.text.encoder = ""
        return cls.open(config, split, names)

    @classmethod
    def packed_split(
        cls, source: Any, config: ml_collections.ConfigDict, split: str
    ) -> PackedSplit:
        """Clouds by their shapes."""
        del config
        return pack.clouds(source, split)

    @classmethod
    def packed_features(cls, tfds: Any, names: Sequence[str]) -> dict[str, Any]:
        """The features of a record."""
        del names
        return pack.features(tfds)


def _variables(params: PyTree, stats: PyTree) -> PyTree:
    """What the network takes, without what belongs to the alignment."""
    return {
        group: {k: v for k, v in tree.items() if k != captioned.MODULE}
        for group, tree in (("params", params), ("batch_stats", stats))
    }
