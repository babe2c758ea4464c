"""AdaPoinTr or PoinTr on PCN, by the recipe of its authors.

python -m jaxaccum.train --config=configs/repro/pcn.py --config.data.path=PCN

Their script for several GPUs synchronises batch norm and leaves its momentum at 0.1: `bn_group=all`
on any number of devices and any microbatch. Figures to expect: docs/repro.md.
"""

from jaxaccum import config as defaults


def get_config(model: str = "adapointr"):
    """The model after the colon: adapointr or pointr."""
    known = {"adapointr": (16, 600.0, 1e-4), "pointr": (48, 300.0, 5e-4)}
    if model not in known:
        raise defaults.ConfigError(f"no recipe {model!r} of PCN; there are {', '.join(known)}")
    config = defaults.completion()
    config.model = f"{model}-pcn"
    config.nbs, config.epochs, config.lr.base = known[model]
    config.lr.base_batch = config.nbs
    config.bn_group = "all"
    config.bn_momentum.update(start=0.1, decay=1.0, final=0.1)
    config.microbatch = 16
    config.eval.every_epochs = 5.0
    return config
