"""Configs of other trainers as ours: every value in its place, and what has none is said."""

import pytest

from jaxaccum import config as configs
from jaxaccum import config_files
from jaxaccum.errors import UserError
from jaxaccum.import_config import imported

ARGS = """
task: detect
model: yolo11n.pt
data: set/data.yaml
epochs: 30
patience: 7
batch: 24
imgsz: 512
save_period: 5
device: {device}
workers: 8
pretrained: {pretrained}
optimizer: {optimizer}
single_cls: {single_cls}
cos_lr: true
close_mosaic: 4
amp: {amp}
val: true
conf: null
iou: 0.6
max_det: 200
lr0: 0.02
lrf: 0.05
momentum: 0.9
weight_decay: 0.001
warmup_epochs: 2
warmup_momentum: 0.7
warmup_bias_lr: 0.05
box: 6
cls: 0.4
dfl: 1.1
nbs: 64
hsv_h: 0.01
mosaic: 0.5
mixup: 0.1
copy_paste: 0.2
"""


def args(tmp_path, **changes):
    file = tmp_path / "args.yaml"
    values = {"device": 0, "pretrained": "true", "optimizer": "SGD", "single_cls": "false"}
    values["amp"] = "true"
    file.write_text(ARGS.format(**values | changes))
    return file


@pytest.mark.parametrize("model", ["yolo26n", "yolo11n"])
def test_end_to_end(tmp_path, model):
    """A choice where the model has both branches; of others it is said that it has no place."""
    file = args(tmp_path)
    text = file.read_text().replace("yolo11n.pt", f"{model}.pt") + "end2end: true\n"
    file.write_text(text)
    found = imported(file)
    config = written(found, tmp_path)
    assert config.model == model.replace("n", "-n")
    if model == "yolo26n":
        assert config.eval.end_to_end is True
        assert not any("end2end" in line for line in found.without)
    else:
        assert "end2end=True" in found.without


@pytest.mark.parametrize(("amp", "dtype"), [("true", "auto"), ("false", "float32")])
def test_mixed_precision(tmp_path, amp, dtype):
    found = imported(args(tmp_path, amp=amp))
    assert written(found, tmp_path).dtype == dtype
    assert any("dtype 'auto' stands for it" in one for one in found.without) == (amp == "true")


def written(found, tmp_path):
    """The file it makes, read as any config is."""
    (tmp_path / "mine.py").write_text(found.text())
    config = config_files.load(str(tmp_path / "mine.py"))
    configs.validate(config)
    assert config == found.config()
    return config


def test_every_value_has_its_place(tmp_path):
    found = imported(args(tmp_path))
    config = written(found, tmp_path)
    assert (config.model, config.init_from) == ("yolo11-n", "yolo11n.pt")
    # There 24 x round(64 / 24) samples are an update, whatever nbs says.
    assert (config.nbs, config.bn_group, config.microbatch) == (72, 24, 24)
    assert config.lr.to_dict() == {
        **configs.detection().lr.to_dict(), "base": 0.02, "base_batch": 64, "final": 0.05,
        "decay": "cosine", "warmup_epochs": 2.0, "warmup_bias": 0.05, "warmup_momentum": 0.7,
    }  # fmt: skip
    assert config.optimizer.name == "sgd" and config.optimizer.weight_decay == 0.001
    assert config.optimizer.weight_decay_scaling == "linear"
    own = {"box": 6.0, "cls": 0.4, "dfl": 1.1}
    assert config.loss.to_dict() == configs.detection().loss.to_dict() | own
    assert (config.augment.mosaic, config.augment.mixup, config.augment.hsv_h) == (0.5, 0.1, 0.01)
    assert (config.eval.patience, config.eval.iou, config.eval.max_det) == (7, 0.6, 200)
    assert (config.epochs, config.data.image_size, config.checkpoint.every_epochs) == (30, 512, 5)
    assert "copy_paste=0.2" in found.without
    assert not config.data.single_cls and config.freeze == 0
    assert not any("single_cls" in one for one in found.without)


@pytest.mark.parametrize(("freeze", "field"), [("10", 10), ("[0, 3]", "model.0,model.3")])
def test_switches(tmp_path, freeze, field):
    file = args(tmp_path, single_cls="true")
    file.write_text(f"{file.read_text()}\nfreeze: {freeze}\ntime: 1.5\nfraction: 0.25\n")
    config = written(imported(file), tmp_path)
    assert (config.freeze, config.hours) == (field, 1.5)
    assert (config.data.single_cls, config.data.fraction) == (True, 0.25)


@pytest.mark.parametrize(
    ("given", "sides"),
    [("0.25", "384,448,512,576,640"), ("true", "256,384,512,640,768"), ("0.0", ""), ("0.01", "")],
)
def test_several_sizes(tmp_path, given, sides):
    file = args(tmp_path)
    file.write_text(f"{file.read_text()}multi_scale: {given}\n")
    found = imported(file)
    assert not any("multi_scale" in line for line in found.without)
    assert written(found, tmp_path).augment.sizes == sides


def test_two_devices_share_a_batch(tmp_path):
    config = written(imported(args(tmp_path, device="'0,1'")), tmp_path)
    assert (config.nbs, config.bn_group, config.microbatch) == (72, 12, 12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"single_cls": "true\nrect: true"}, "rect=True"),
        ({"optimizer": "RMSProp"}, "optimizer=RMSProp: adamw in its place"),
    ],
)
def test_what_has_no_counterpart_is_said(tmp_path, change, said):
    found = imported(args(tmp_path, **change))
    assert said in found.without and f"# no counterpart: {said}" in found.text()
    written(found, tmp_path)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("yolov8s-p2.yaml", "yolov8-p2-s"), ("yolo12x.pt", "yolo12-x"), ("yolov8n", "yolov8-n"),
        ("yolo26n.pt", "yolo26-n"), ("yolo26s-p2.yaml", "yolo26-p2-s"),
        ("runs/train/weights/best.pt", None), ("", None),
    ],
)  # fmt: skip
def test_models(tmp_path, model, name):
    file = tmp_path / "args.yaml"
    file.write_text(f"model: {model}\nimgsz: 640\nlr0: 0.01\n")
    found = imported(file)
    assert found.fields.get("model", (None,))[0] == name
    assert ("init_from" in found.fields) == model.endswith(".pt")
    assert (name is None) == any("architecture" in one for one in found.without)


def test_weights_are_left_where_they_were_not_taken(tmp_path):
    assert "init_from" not in imported(args(tmp_path, pretrained="false")).fields
    assert imported(args(tmp_path, pretrained="other.pt")).fields["init_from"][0] == "other.pt"


POINTR = """
optimizer: {type: AdamW, kwargs: {lr: 0.0003, weight_decay: 0.0005}}
scheduler: {type: LambdaLR, kwargs: {decay_step: 21, lr_decay: 0.76, lowest_decay: 0.02}}
dataset:
  train: {_base_: cfgs/dataset_configs/PCN.yaml, others: {subset: train}}
model: {NAME: AdaPoinTr, num_query: 512}
total_bs: 32
step_per_update: 2
gradient_accumulation_steps: 4
max_epoch: 200
grad_norm_clip: 5
"""


def test_pointr(tmp_path):
    (tmp_path / "a.yaml").write_text(POINTR)
    found = imported(tmp_path / "a.yaml")
    config = written(found, tmp_path)
    assert config.model == "adapointr-pcn" and config.augment.mirror
    assert (config.nbs, config.lr.base_batch, config.epochs) == (64, 64, 200.0)
    assert (config.lr.base, config.lr.decay_rate, config.lr.decay_epochs) == (0.0003, 0.76, 21)
    assert config.optimizer.clip == 5.0
    assert any("accumulates nothing" in one for one in found.without)
    (tmp_path / "a.yaml").write_text(POINTR.replace("AdaPoinTr", "GRNet"))
    with pytest.raises(configs.ConfigError, match="its model is GRNet"):
        imported(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: segment\nimgsz: 640", "its task is 'segment'"),
        ("imgsz: 640\nlr0: 0.1\nbatch: many", "batch is a number; got 'many'"),
        ("imgsz: 641\nlr0: 0.1\nmodel: yolov8n.pt", r"data\.image_size"),
        ("imgsz: big\nlr0: 0.1", r"data\.image_size"),
        ("imgsz: 640\nlr0: .nan", r"lr\.base"),
        ("- 1", "expected the args.yaml"), ("a: [", r"args\.yaml:1: not valid YAML: expected"),
        ("imgsz: 640\nlr0: 0.1\nlr0: 0.2", r"args\.yaml:3: .* 'lr0' is in line 2 already"),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path, text, said):
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        imported(tmp_path / "args.yaml").text()


def test_what_is_no_file_is_not_called_yaml(tmp_path):
    (tmp_path / "big.yaml").write_text("#" * (1 << 22))
    for name, said in {
        "none.yaml": "none.yaml: no such file. Check the path.",
        "": f"{tmp_path}: a folder, expected a file. Check the path.",
        "big.yaml": "big.yaml: 4,194,304 bytes, expected at most 2,097,152.",
    }.items():
        with pytest.raises(UserError) as caught:
            imported(tmp_path / name)
        assert said in str(caught.value) and "YAML" not in str(caught.value)


def test_values_have_the_types_of_yaml(tmp_path):
    (tmp_path / "args.yaml").write_text("imgsz: 640\nlr0: 1.0e-2\nfreeze: null\nx: {1: 2}\n")
    found = imported(tmp_path / "args.yaml")
    assert found.fields["lr.base"][0] == 0.01 and "freeze" not in found.fields
