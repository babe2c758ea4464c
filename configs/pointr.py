"""PoinTr on the embedded shapes, or on your data: --config.data.path=FOLDER:BENCHMARK.

The reference's recipe (Yu et al. 2021, arXiv:2108.08839): AdamW at 5e-4.
But for batch norm: there the samples of a device share statistics, here groups of 8.
"""

from jaxaccum import config as defaults


def get_config(benchmark: str = "shapenet34"):
    """The benchmark after the colon: pcn, shapenet55 or shapenet34."""
    config = defaults.completion()
    known = {
        "pcn": (48, 300.0, 0.9), "shapenet55": (96, 200.0, 0.76), "shapenet34": (128, 200.0, 0.9),
    }  # fmt: skip
    if benchmark not in known:
        raise defaults.ConfigError(f"no benchmark {benchmark!r}; there are {', '.join(known)}")
    nbs, epochs, decay = known[benchmark]
    config.model = "pointr-pcn" if benchmark == "pcn" else "pointr-shapenet"
    config.nbs = config.lr.base_batch = nbs
    config.epochs = epochs
    config.lr.base = 5e-4
    config.lr.decay_rate = decay
    config.augment.mirror = benchmark == "pcn"
    config.eval.unseen = benchmark == "shapenet34"
    return config
