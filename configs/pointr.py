"""PoinTr on the embedded shapes, or on your data: --config.data.path=FOLDER:BENCHMARK.

The reference's recipe (Yu et al. 2021, arXiv:2108.08839): AdamW at 5e-4.
"""

from jaxaccum import config as defaults


def get_config(benchmark: str = "shapenet34"):
    """The benchmark after the colon: pcn, shapenet55 or shapenet34."""
    config = defaults.completion()
    nbs, epochs, decay = {
        "pcn": (48, 300.0, 0.9), "shapenet55": (96, 200.0, 0.76), "shapenet34": (128, 200.0, 0.9),
    }[benchmark]  # fmt: skip
    config.model = "pointr-pcn" if benchmark == "pcn" else "pointr-shapenet"
    config.nbs = config.lr.base_batch = nbs
    config.epochs = epochs
    config.lr.base = 5e-4
    config.lr.decay_rate = decay
    config.augment.mirror = benchmark == "pcn"
    config.eval.unseen = benchmark == "shapenet34"
    return config
