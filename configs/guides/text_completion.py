"""Text-conditioned AdaPoinTr with 48 or 96 clouds an update, as the guide to its memory has it.

python -m jaxaccum.train --config=configs/guides/text_completion.py:96
    --config.data.path=DATA/ShapeNet55-34:Projected_ShapeNet-34_noise

48 at a learning rate of 1e-4, and the square-root rule for others: 96 takes 1.41e-4. What the guide
writes as bs and gradient_accumulation_steps is microbatch here, from 4 x 12 to 48 x 1 by memory.
"""

from jaxaccum import config as defaults


def get_config(nbs: str = "48"):
    """The effective batch after the colon: 48 or 96."""
    if nbs not in ("48", "96"):
        raise defaults.ConfigError(f"no effective batch {nbs!r} in the guide; there are 48 and 96")
    config = defaults.completion()
    config.model = "adapointr-projected"
    config.nbs = int(nbs)
    config.lr.update(base=1e-4, base_batch=48, scaling="sqrt")
    config.text.encoder = "hashed"  # or clip-projected:CLIP, as configs/adapointr_text.py says
    config.text.point_encoder = "pointbert"
    config.eval.unseen = "auto"
    config.bn_group = 4
    config.microbatch = 8
    return config
