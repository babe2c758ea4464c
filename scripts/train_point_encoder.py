"""Trains the point encoder that judges whether a completed cloud fits its caption.

python scripts/train_point_encoder.py --config=FILE --out=ENCODER.safetensors [--updates=400]
    [--nbs=48] [--lr=1e-3] [--allow_wrong_numbers] [--config.key=value ...]

For a data set without weights of ULIP-2: complete clouds of the training split against their
captions, by InfoNCE over the whole effective batch in microbatches (accumulate.coupled). The config
says text.encoder, text.point_encoder, the data and the geometry; the file is what
text.point_weights takes. Prints how often a cloud finds its caption, in training and on the val
split, against guessing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from safetensors.numpy import save_file

from jaxaccum import config_files
from jaxaccum.machine import known_answers

CONFIG = config_files.define()
OUT = flags.DEFINE_string("out", None, "the file to write, *.safetensors", required=True)
UPDATES = flags.DEFINE_integer("updates", 400, "updates", lower_bound=1)
NBS = flags.DEFINE_integer("nbs", 48, "effective batch: clouds that are each other's negatives")
RATE = flags.DEFINE_float("lr", 1e-3, "peak learning rate of AdamW, cosine to 0")
ALLOW = flags.DEFINE_bool("allow_wrong_numbers", False, known_answers.FLAG_HELP)


def main() -> int:
    from jaxaccum import data
    from jaxaccum.accumulate import (
        Coupled,
        Geometry,
        Objective,
        Output,
        Recipe,
        Term,
        UpdateRule,
        Window,
        make_engine,
    )  # fmt: skip
    from jaxaccum.losses import alignment
    from jaxaccum.models import pointbert
    from jaxaccum.tasks.completion import captioned
    from jaxaccum.training import run
    from jaxaccum.weights import transfer as weights

    run.use_compilation_cache()
    known_answers.require(ALLOW.value)
    config = CONFIG.value
    if not (config.text.encoder and config.text.point_encoder):
        raise SystemExit("the config needs text.encoder and text.point_encoder")
    source, val = (run.open_source(config, split) for split in ("train", "val"))
    clouds, texts = captioned.parts(source)
    print(*source.report.lines(), sep="\n")
    table = pointbert.table_of(config.text.point_encoder)
    model = pointbert.PointBert(table, run.compute_dtype(config))
    frozen = pointbert.initialise(table, config.seed, texts.width)
    params = {
        "encoder": frozen.params, "projection": frozen.projection,
        "logit_scale": np.float32(-np.log(config.text.temperature)),
    }  # fmt: skip

    def embed(params, stats, points):
        own = pointbert.Frozen(params["encoder"], stats, params["projection"])
        return pointbert.embed(model, own, points)

    def forward(params, stats, batch, groups):
        del groups  # none is normalised by its batch
        vectors = embed(params, stats, batch["complete"])
        features = {
            "cloud": vectors,
            "text": batch["text"],
            "caption": batch["caption"].astype(vectors.dtype),
        }
        return Output({"none": jnp.zeros([])}, {"samples": jnp.sum(batch["weight"])}, {}, features)

    def loss(params, f, weight):
        scale = jnp.where(params["logit_scale"] < np.log(100.0), params["logit_scale"], np.log(100))
        return alignment.info_nce(f["cloud"], f["text"], scale, weight, f["caption"])

    def accuracy(params, f, weight):
        return alignment.accuracy(f["cloud"], f["text"], weight, f["caption"])

    contrast = Coupled("contrast", 1.0, loss, {"accuracy": accuracy})
    objective = Objective((Term("none", 0.0, "samples"),), {"samples": 1.0}, coupled=(contrast,))
    schedule = optax.warmup_cosine_decay_schedule(
        0, RATE.value, min(50, UPDATES.value // 4), UPDATES.value
    )
    rule = UpdateRule(objective, optax.adamw(schedule, weight_decay=0.05), clip=10.0)
    devices = config.devices or 1
    window = Window(Recipe(NBS.value, "frozen"), Geometry(config.microbatch, devices))
    print(window)
    engine = make_engine(forward, rule, window)
    state = engine.init(params, frozen.stats)
    stream = data.CloudStream(clouds, seed=config.seed, mirror=config.augment.mirror, texts=texts)
    for batch in stream.windows(0, [NBS.value] * UPDATES.value):
        state, log = engine.update(state, batch)
        step = int(log["step"])
        if step % max(UPDATES.value // 20, 1) == 0:
            print(
                f"update {step}/{UPDATES.value} | loss {float(log['loss']):.3f} | right caption of "
                f"{NBS.value}: {float(log['metrics/accuracy']):.3f}", flush=True,
            )  # fmt: skip

    params, stats = jax.device_get((state.params, state.stats))
    vectors_of = jax.jit(embed)
    for title, split in (("train", source), ("val", val)):
        clouds, texts = captioned.parts(split)
        found, ids = [], []
        for batch in data.cloud_batches(clouds, batch=16, texts=texts):
            real = batch["weight"] > 0
            found.append(np.asarray(vectors_of(params, stats, batch["complete"]))[real])
            ids.append(batch["caption"][real])
        scores = captioned.retrieval(np.concatenate(found), np.concatenate(ids), texts.vectors)
        print(f"{title}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))

    tensors = weights.to_reference(params["encoder"]) | weights.to_reference(stats)
    state_dict = {f"point_encoder.{k}": np.ascontiguousarray(v) for k, v in tensors.items()}
    state_dict |= {"pc_projection": params["projection"], "logit_scale": params["logit_scale"]}
    Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.asarray(v) for k, v in state_dict.items()}, OUT.value)
    print(f"{len(state_dict)} tensors in {OUT.value}")
    return 0


if __name__ == "__main__":
    from jaxaccum import command_line

    command_line.run_verb(main, __doc__, ())
