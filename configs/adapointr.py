"""AdaPoinTr on the embedded shapes, or on your data: --config.data.path=FOLDER:BENCHMARK.

The reference's recipe (Yu et al. 2023, arXiv:2301.04545): 48 clouds per update, AdamW, 600 epochs.
But for batch norm: there the samples of a device share statistics, here groups of 8. For the
reference's on one device set bn_group=all, which is another recipe; the microbatch stays free.
"""

from jaxaccum import config as defaults


def get_config(benchmark: str = "projected_shapenet34"):
    """The benchmark after the colon: pcn, shapenet55, shapenet34, projected_shapenet55 or
    projected_shapenet34."""
    config = defaults.completion()
    known = {
        "pcn": "pcn", "shapenet55": "shapenet", "shapenet34": "shapenet",
        "projected_shapenet55": "projected", "projected_shapenet34": "projected",
    }  # fmt: skip
    if benchmark not in known:
        raise defaults.ConfigError(f"no benchmark {benchmark!r}; there are {', '.join(known)}")
    kind = known[benchmark]
    config.model = f"adapointr-{kind}"
    if kind == "pcn":
        config.nbs = config.lr.base_batch = 16
    config.augment.mirror = kind != "shapenet"
    # ShapeNet-34 models are judged on 21 categories that they have never seen, too.
    config.eval.unseen = benchmark.endswith("34")
    return config
