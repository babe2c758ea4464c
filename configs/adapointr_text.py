"""Text-conditioned AdaPoinTr: captions shape the queries, completed clouds are aligned with them.

python -m jaxaccum.train --config=configs/adapointr_text.py --config.data.path=FOLDER:BENCHMARK
    --config.text.captions=CAPTIONS.csv --config.text.encoder=clip-projected:CLIP
    --config.text.point_weights=ULIP2.pt --config.init_from=ADAPOINTR.pth

The recipe of the text-conditioned fork as it was meant: transfer from a plain AdaPoinTr, weight
0.05 and temperature 0.07 of the alignment, which contrasts the whole effective batch. Without CLIP
on your disk captions are hashed words; without ULIP-2's weights the point encoder is random, or
train one by scripts/train_point_encoder.py.
"""

from jaxaccum import config as defaults


def get_config(size: str = "projected"):
    """What stands after the colon: projected, or small for a laptop."""
    config = defaults.completion()
    if size not in ("projected", "small"):
        raise defaults.ConfigError(f"no size {size!r}; there are projected and small")
    config.model = f"adapointr-{size}"
    config.text.encoder = "hashed"
    config.text.point_encoder = "pointbert-small" if size == "small" else "pointbert"
    config.eval.unseen = "auto"
    if size == "small":  # fine-tunes a run of quickstart_completion.py
        config.epochs = 30.0
        config.loss.align = 0.0005  # docs/completion.md: more of it bends the shapes
        config.lr.update(base=3e-4, decay="cosine", warmup_epochs=1.0)
        config.bn_momentum.update(start=0.1, epochs=15.0, final=0.05)
    return config
