"""AdaPoinTr or PoinTr on ShapeNet-55 or ShapeNet-34, by the recipe of their authors.

python -m jaxaccum.train --config=configs/repro/shapenet.py:adapointr-34
    --config.data.path=DATA/ShapeNet55-34:ShapeNet-34

Batch norm as configs/repro/pcn.py has it. Figures to expect: docs/repro.md.
"""

from jaxaccum import config as defaults


def get_config(run: str = "adapointr-55"):
    """The model and the benchmark after the colon: adapointr-55, adapointr-34, pointr-55 or
    pointr-34. The 21 unseen categories are evaluated with the 34."""
    known = {  # effective batch, epochs, rate, and what is left of it after 21 epochs
        "adapointr-55": (48, 600.0, 1e-4, 0.9), "adapointr-34": (48, 600.0, 1e-4, 0.9),
        "pointr-55": (96, 200.0, 5e-4, 0.76), "pointr-34": (128, 200.0, 5e-4, 0.9),
    }  # fmt: skip
    if run not in known:
        raise defaults.ConfigError(f"no recipe {run!r} of ShapeNet; there are {', '.join(known)}")
    config = defaults.completion()
    config.model = f"{run.partition('-')[0]}-shapenet"
    config.nbs, config.epochs, config.lr.base, config.lr.decay_rate = known[run]
    config.lr.base_batch = config.nbs
    config.bn_group = "all"
    config.bn_momentum.update(start=0.1, decay=1.0, final=0.1)
    config.augment.mirror = False
    config.eval.unseen = run.endswith("34")
    config.microbatch = 16
    config.eval.every_epochs = 5.0
    return config
