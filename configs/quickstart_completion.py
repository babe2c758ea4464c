"""Point completion on a laptop: a small AdaPoinTr, on the embedded shapes or a few of your own.

python -m jaxaccum.train --config=configs/quickstart_completion.py
"""

from jaxaccum import config as defaults


def get_config():
    config = defaults.completion()
    config.model = "adapointr-small"
    config.nbs = 16
    config.bn_group = 8
    config.steps = 400

    config.lr.base = 7e-4
    config.lr.base_batch = 16
    config.lr.decay = "cosine"
    config.lr.warmup_epochs = 0.2
    config.bn_momentum.update(start=0.3, epochs=1.0, final=0.05)

    config.microbatch = 8
    config.log.every = 20
    config.eval.every = 200
    config.eval.unseen = "auto"
    config.checkpoint.every = 100
    return config
