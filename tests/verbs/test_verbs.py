"""The command line of every verb: words, configs, help, errors in a line, exit statuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import tiny

from jaxaccum import config as configs
from jaxaccum import config_files, data, export, tasks
from jaxaccum.accumulate.update import State
from jaxaccum.data import movies
from jaxaccum.tasks import files
from jaxaccum.training import checkpoint, inference, run

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "configs" / "quickstart.py")
VERBS = (
    "train",
    "evaluate",
    "predict",
    "convert",
    "export",
    "compare",
    "calibrate",
    "import_config",
    "pack",
    "plan",
)
NEED_CONFIG = ("train", "calibrate", "pack", "plan")


@dataclasses.dataclass
class Done:
    """What a verb said, and its exit status."""

    status: int
    out: str
    err: str

    def refused(self, *words: str, status: int = 1) -> None:
        """One line of stderr with these words, and nothing else."""
        assert self.status == status, self
        assert "Traceback" not in self.err + self.out, self.err
        # On Python 3.11, where JAX is 0.10.2, one says which of XLA's flags is set.
        told = ("note:", "jaxlib 0.10.2 computes wrong numbers")
        lines = [line for line in self.err.splitlines() if not line.startswith(told)]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for word in words:
            assert word in lines[0], lines[0]


@pytest.fixture(scope="session")
def verb(tmp_path_factory):
    """Runs a verb in a fork of a process that has imported all."""
    folder = tmp_path_factory.mktemp("said")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "verb_server.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def call(*words: str, cwd: Path = ROOT, out: str | None = "", err: str | None = "",
             encoding: str = "utf-8", env: dict | None = None, limits: dict | None = None,
             stop: float = 0) -> Done:  # fmt: skip
        files = [folder / "out", folder / "err"]
        for file in files:
            file.unlink(missing_ok=True)
        asked = {
            "words": list(words), "cwd": str(cwd), "encoding": encoding, "env": env or {},
            "out": str(files[0]) if out == "" else out, "err": str(files[1]) if err == "" else err,
            "limits": limits or {}, "stop": stop,
        }  # fmt: skip
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        said = [file.read_bytes().decode(encoding, "replace") if file.exists() else ""
                for file, encoding in zip(files, (encoding, "utf-8"), strict=True)]  # fmt: skip
        return Done(status, *said)

    yield call
    server.stdin.close()
    server.wait()


# --- Words. ---


@pytest.mark.parametrize("name", VERBS)
def test_words_that_are_no_flag(verb, name):
    """Before: ignored, and the verb went on without them."""
    verb(name, "epochs=50").refused("'epochs=50' is no flag", status=2)
    verb(name, "runs/mine").refused("'runs/mine' is no flag", status=2)
    verb(name, "--", "x").refused("is no flag", status=2)


@pytest.mark.parametrize("name", NEED_CONFIG)
@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("epochs=50",), "--config.epochs=50"), (("--epochs=50",), "--config.epochs=50"),
        (("-epochs=50",), "--config.epochs=50"), (("--epoch=50",), "--config.epochs=50"),
        (("config.epochs=50",), "--config.epochs=50"), (("base=0.1",), "--config.lr.base=0.1"),
        (("image_size=320",), "--config.data.image_size=320"),
        (("\u2014config.nbs=4",), "--config.nbs=4"), (("\u2013config=a.py",), "--config=a.py"),
        (("---config=a.py",), "--config=a.py"), ((QUICK,), f"--config={QUICK}"),
        (("config=a.py",), "--config=a.py"), (("--confg=a.py",), "--config=a.py"),
    ],
    ids=str,
)  # fmt: skip
def test_the_flag_that_was_meant(verb, name, words, meant):
    config = [] if "config" in words[0] or words[0] == QUICK else [f"--config={QUICK}"]
    verb(name, *config, *words).refused(f"did you mean {meant}?", status=2)
    # Behind or before other flags alike.
    verb(name, *words, *config).refused(f"did you mean {meant}?", status=2)


def test_a_flag_of_the_verb_without_its_dashes(verb, tmp_path):
    verb("evaluate", "workdir=runs/mine").refused("did you mean --workdir=runs/mine?", status=2)
    verb("evaluate", str(tmp_path)).refused(f"did you mean --workdir={tmp_path}?", status=2)
    verb("predict", "--workdir=a", "--sorce=b").refused("did you mean --source=b?", status=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--workdir",), "workdir"), (("--workdir=",), "--workdir is empty"), ((), "--workdir is"),
        (("--workdir", "=", "x"), "without spaces"), (("--workdir=x", "--pictures=a"), "pictures"),
        (("--workdir=x", "--pictures=-1"), "pictures"), (("--workdir=x", "-"), "no flag"),
        (("--workdir=x", "--precise_bn=99999999999999999999"), "precise_bn"),
        (("--workdir=x", "--flagfile=/nothing/there"), "flagfile"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_of_flags(verb, words, said):
    verb("evaluate", *words).refused(said, status=2)


def test_numbers_that_are_none(verb):
    predict = ("predict", "--workdir=x", "--source=y", "--out=z")
    verb(*predict, "--conf=nan").refused("--conf is a finite number", status=2)
    verb(*predict, "--conf=2").refused("conf", status=2)
    plan = ("plan", f"--config={QUICK}", "--classes=3")
    verb(*plan, "--microbatches=\u00b2").refused("--microbatches takes whole numbers")
    verb(*plan, "--memory=1.2.3GiB").refused("--memory takes sizes")
    verb(*plan, "--memory=9999999999999TiB").refused("--memory takes sizes")
    verb("plan", f"--config={QUICK}", "--classes=1000000000").refused("classes", status=2)
    verb("calibrate", f"--config={QUICK}", "--geometries=\u00b2").refused("a geometry is")
    verb("compare", f"--configs={QUICK}", "--out=x", "--seeds=\u00b2").refused("--seeds are")


def test_a_flag_that_is_given_twice(verb, tmp_path):
    workdir = f"--workdir={tmp_path / 'no' / 'such'}"
    done = verb("evaluate", "--workdir=/first", workdir)
    done.refused(str(tmp_path))
    assert f"note: --workdir is given twice (/first, then {tmp_path}" in done.err
    assert "note" not in verb("evaluate", workdir, workdir).err
    twice = [f"--config={QUICK}"] * 2
    verb("train", *twice).refused("--config is given twice", status=2)


# --- Configs. ---


@pytest.mark.parametrize("name", NEED_CONFIG)
def test_without_a_config(verb, name):
    done = verb(name)
    assert done.status == 2 and "Traceback" not in done.err
    assert f"python -m jaxaccum.{name} --config=FILE" in done.err.splitlines()[0]
    for file in (ROOT / "configs").glob("*.py"):
        assert f"configs/{file.name}" in done.err
    assert "Minutes on a laptop" in done.err


BROKEN = {
    "syntax": ("def get_config(:\n    pass\n", "bad.py:1: not valid Python"),
    "later": ("x = 1\ny = (\n", "bad.py:2: not valid Python"),
    "indent": ("def get_config():\nreturn 1\n", "bad.py:2: not valid Python"),
    "nul": ("x = 1\0\n", "bad.py"),
    "none": ("x = 1\n", "there is no get_config() in it"),
    "variable": ("get_config = 3\n", "there is no get_config() in it"),
    "raises": ("def get_config():\n    x = 1\n    return x / 0\n", "bad.py:3: ZeroDivisionError"),
    "imports": ("import nothing_of_this_name\n", "bad.py:1: ModuleNotFoundError"),
    "ends": ("import sys\nsys.exit(3)\n", "bad.py:2: SystemExit: 3"),
    "many lines": ("def get_config():\n    raise ValueError('a\\nb\\nc')\n", "ValueError: a b c"),
    "nothing": ("def get_config():\n    pass\n", "get_config() returned None"),
    "a dict": ("def get_config():\n    return {'nbs': 4}\n", "get_config() returned {'nbs': 4}"),
    "empty": ("import ml_collections\nget_config = ml_collections.ConfigDict\n", "task is one of"),
    "mistyped": (
        "from jaxaccum import config\ndef get_config():\n    c = config.detection()\n"
        "    c.epoch = 3.0\n    return c\n", 'no field \'epoch\'. Did you mean "epochs"?',
    ),
    "of another type": (
        "from jaxaccum import config\ndef get_config():\n    c = config.detection()\n"
        "    c.epochs = 'many'\n    return c\n", "bad.py:4: TypeError",
    ),
    "no number": (
        "from jaxaccum import config\ndef get_config():\n    c = config.detection()\n"
        "    c.epochs = None\n    return c\n", "epochs is a number; got None",
    ),
    "nan": (
        "from jaxaccum import config\ndef get_config():\n    c = config.detection()\n"
        "    c.loss.box = float('nan')\n    return c\n", "loss.box is in 0 to 1e+09; got nan",
    ),
    "its own error": (
        "from jaxaccum import config\ndef get_config():\n    raise config.ConfigError('so')\n",
        "error: so",
    ),
    "latin": ("# -*- coding: utf-8 -*-\nx = '\xff'\n".encode("latin-1"), "bad.py"),
    "recursion": ("def get_config():\n    return get_config()\n", "bad.py:2: RecursionError"),
    "needs an argument": ("def get_config(a):\n    return a\n", "needs an argument: --config="),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_file_that_is_none(verb, tmp_path, case):
    """Before: 41 lines of traceback and more for most."""
    text, said = BROKEN[case]
    file = tmp_path / "bad.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    verb("train", f"--config={file}").refused(said)


def test_a_config_file_that_is_not_there(verb, tmp_path):
    for name in NEED_CONFIG:
        out = [f"--out={tmp_path / 'out'}"] if name == "pack" else []
        done = verb(name, "--config=configs/yolo_z.py", *out)
        done.refused("configs/yolo_z.py: there is no such file. Did you mean configs/yolo_")
    verb("compare", "--configs=configs/yolo_z.py", "--out=x").refused("there is no such file")
    verb("train", "--config=quikstart").refused("Did you mean configs/quickstart.py?")
    verb("train", "--config=").refused("no such file")
    verb("train", f"--config={tmp_path}").refused("a folder, expected a file")
    os.mkfifo(tmp_path / "pipe.py")
    verb("train", f"--config={tmp_path / 'pipe.py'}").refused("a pipe or a device")
    verb("train", f"--config={tmp_path / ('x' * 300)}.py").refused("cannot be read")


def test_an_argument_that_the_file_does_not_take(verb):
    verb("train", f"--config={QUICK}:v8").refused("takes no argument after the colon; got 'v8'")
    verb("train", "--config=configs/yolo_n.py:v99").refused("there is no 'yolov99-n'")
    verb("train", "--config=configs/pointr.py:x").refused("no benchmark 'x'; there are pcn")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--config.epoch=5", 'no field \'epoch\'. Did you mean "epochs"?'),
        ("--config.lr=0.1", "'lr' is a group of fields: set one of lr.base"),
        ("--config.lr={'base': 1}", "'lr' is a group"), ("--config.=3", "no field ''"),
        ("--config.epochs.x=5", "no field 'epochs.x'"), ("--noconfig.epochs", "not true or false"),
        ("--config.keys=5", "no field 'keys'"), ("--config.lr.__class__=5", "no field"),
        ("--config.nbs=inf", "nbs"), ("--config.nbs=1e9", "nbs"),
        ("--config.remat=maybe", "remat is one of none, blocks, host"),
        ("--config.lr.base=nan", "lr.base is in"), ("--config.lr.base=inf", "lr.base is at most"),
        ("--config.nbs=1000000000", "nbs is at most 1,000,000"),
        ("--config.steps=1000000000", "steps is at most 10,000,000"),
        ("--config.epochs=1e9", "epochs is at most 10,000,000"),
        ("--config.epochs=-1", "epochs is at least 0"), ("--config.seed=-1", "seed is at least 0"),
        ("--config.seed=2147483648", "seed is at most 2,147,483,647"),
        ("--config.nbs=" + "9" * 60, "nbs is at"),
        ("--config.data.image_size=1000000", "data.image_size is at most 16,384"),
        ("--config.data.workers=100000", "data.workers is in 0 to 1024"),
        ("--config.bn_group=[1]", "bn_group is a positive integer"),
        ("--config.bn_group=True", "bn_group is a positive integer"),
        ("--config.microbatch=10000000", "microbatch is a positive integer, at most 1,000,000"),
        ("--config.microbatch=" + "(" * 5000, "microbatch is a positive integer"),
        ("--config.microbatch=" + "-" * 50_000 + "1", "a field cannot be set"),
        ("--config.augment.degrees=nan", "augment.degrees is in 0 to 180; got nan"),
        ("--config.eval.every=-2", "eval.every is at least -1"),
        ("--config.model=" + "x" * 300, "model: there is no"),
    ],
    ids=lambda text: str(text)[:40],
)  # fmt: skip
def test_overrides(verb, word, said):
    done = verb("plan", f"--config={QUICK}", "--classes=2", word)
    done.refused(said, status=done.status)
    assert done.status in (1, 2)


def test_steps_that_the_data_make_too_many():
    config = configs.detection()
    config.update_from_flattened_dict({"epochs": 1e6, "nbs": 1})
    with pytest.raises(configs.ConfigError, match=r"1,000,000,000 updates, and a run has at most"):
        run.prepare(config, names=["a"], samples=1000, identity={})


def sizes_one_by_one(config, samples):
    """The ramp of the compat rule, as it is written down: one microbatch after the other."""
    total = config.steps * config.nbs if config.steps else config.epochs * samples
    batch = config.microbatch
    ratio, warmup = config.nbs / batch, round(config.lr.warmup_epochs * samples / batch)
    sizes, done = [], 0
    while done < total:
        k = 0
        while True:
            k += 1
            number = done // batch + k - 1
            wanted = 1 + (ratio - 1) * number / warmup if number < warmup else ratio
            if k >= max(round(wanted), 1):
                break
        sizes.append(k * batch)
        done += k * batch
    return sizes


@pytest.mark.parametrize("seed", range(40))
def test_the_ramp_of_compat_is_what_it_was(seed):
    rng = np.random.default_rng(seed)
    config = configs.detection()
    config.compat = True
    config.update_from_flattened_dict(
        {"nbs": int(rng.integers(1, 200)), "microbatch": int(rng.integers(1, 40)),
         "epochs": float(rng.uniform(0.1, 6)), "lr.warmup_epochs": float(rng.uniform(0, 4))}
    )  # fmt: skip
    samples = int(rng.integers(1, 500))
    sizes, wanted = run._sizes(config, 1, samples), sizes_one_by_one(config, samples)
    assert [sizes.of(i) for i in range(sizes.updates)] == wanted
    assert sizes.total == sum(wanted) and sizes.extremes == (min(wanted), max(wanted))
    assert [sizes.before(i) for i in range(sizes.updates)] == [0, *np.cumsum(wanted)[:-1]]
    assert sizes.before(sizes.updates + 3) == sum(wanted) + 3 * wanted[-1]


def test_a_ramp_to_a_huge_batch_takes_no_time():
    """nbs=1e9 in compat counted to it one by one, for every update."""
    config = configs.detection()
    config.compat = True
    config.update_from_flattened_dict({"nbs": configs.MOST_SAMPLES, "microbatch": 1, "epochs": 1e4})
    start = time.monotonic()
    sizes = run._sizes(config, 1, 1000)
    assert sizes.of(sizes.updates) == configs.MOST_SAMPLES and sizes.total >= 1e7
    assert time.monotonic() - start < 5


# --- Help. ---


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help(verb, name, word):
    """Before: exit status 1, and the framework's flags among ours."""
    done = verb(name, word)
    assert done.status == 0 and not done.err
    lines = done.out.splitlines()
    assert lines[0] == "Examples:" and f"  python -m jaxaccum.{name} --" in done.out
    assert done.out.index("Examples:") < done.out.index("\nFlags:\n")
    assert ("--config=" in done.out) >= (name in NEED_CONFIG)
    assert "pdb" not in done.out and "flagfile" not in done.out
    assert not any(len(line) > 130 for line in lines)


def test_the_frameworks_flags_come_last(verb):
    done = verb("evaluate", "--helpfull")
    assert done.status == 0
    assert done.out.index("--precise_bn") < done.out.index("beneath:") < done.out.index("--pdb")


def test_every_example_of_the_help_has_flags_of_its_verb(verb):
    for name in VERBS:
        lines = verb(name, "--help").out.splitlines()
        flags = {line.split("=")[0].strip() for line in lines if line.startswith("  --")}
        for line in lines:
            if line.startswith("  python -m jaxaccum."):
                given = {word.split("=")[0] for word in line.split() if word.startswith("--")}
                assert all(f.startswith("--config.") or f in flags for f in given), line


# --- Runs without best weights. ---


@pytest.fixture(scope="module")
def unevaluated(tmp_path_factory):
    """A run with two checkpoints that never evaluated; the newer's average is all its own."""
    workdir = tmp_path_factory.mktemp("run") / "unevaluated"
    config = tiny.tiny_config(steps=2)
    task = tasks.of(config).create(config, ("a", "b"), np.dtype(np.float32))
    params, stats = jax.device_get(task.initialise(0))
    meta = {"fingerprint": "f", "config": config.to_dict(), "names": ["a", "b"], "facts": {}}
    with checkpoint.Checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            averaged = jax.tree.map(lambda a, s=step: a + s, {"params": params, "stats": stats})
            counts = [np.int32(step)] * 3
            checkpoints.save(step, State(params, stats, (), averaged, *counts), meta)
    assert not (workdir / "best").exists()
    return workdir, averaged


def test_the_last_weights_where_there_are_no_best(unevaluated, capsys):
    workdir, averaged = unevaluated
    found = inference.load(workdir)
    assert found.step == 2
    assert "no best weights yet: using the last, of update 2" in capsys.readouterr().err
    for ours, theirs in zip(
        jax.tree.leaves({"params": found.params, "stats": found.stats}), jax.tree.leaves(averaged),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_last_checkpoint_is_passed_over(unevaluated, tmp_path):
    workdir = shutil.copytree(unevaluated[0], tmp_path / "run")
    shutil.rmtree(workdir / "last" / "2" / "tree")
    assert inference.load(workdir).step == 1
    assert (workdir / "last" / "2").is_dir()  # reading moves nothing


def test_verbs_on_a_run_without_best(verb, unevaluated, tmp_path):
    workdir = f"--workdir={unevaluated[0]}"
    done = verb("convert", f"--from={unevaluated[0]}", f"--to={tmp_path / 'w.safetensors'}")
    assert done.status == 0 and "using the last, of update 2" in done.err
    done = verb("export", workdir, f"--out={tmp_path / 'w.hlo'}", "--platforms=cpu", "--batch=1")
    assert done.status == 0 and "using the last, of update 2" in done.err
    assert export.load_exported(tmp_path / "w.hlo")


def test_a_folder_that_is_no_run(verb, tmp_path):
    for name, more in (("evaluate", ()), ("export", ("--out=x",)),
                       ("predict", ("--source=y", "--out=z"))):  # fmt: skip
        done = verb(name, f"--workdir={tmp_path}", *more, cwd=tmp_path)
        done.refused("holds no trained weights")
        assert not list(tmp_path.iterdir())  # none was made of it, either
        verb(name, "--workdir=nothing", *more, cwd=tmp_path).refused("no such folder")


# --- Folders to predict from. ---


@pytest.fixture(scope="module")
def run_of_a_detector(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "detector"
    export_run(workdir)
    return workdir


def export_run(workdir):
    config = tiny.tiny_config()
    task = tasks.of(config).create(config, ("a", "b"), np.dtype(np.float32))
    params, stats = task.initialise(0)
    meta = {"fingerprint": "", "config": config.to_dict(), "names": ["a", "b"], "facts": {}}
    with checkpoint.Checkpoints(workdir) as checkpoints:
        checkpoints.save_best(0, {"params": params, "stats": stats}, meta)


def picture(seed: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


def write_gif(file: Path, count: int) -> None:
    import PIL.Image

    first, *others = [PIL.Image.fromarray(picture(i)) for i in range(count)]
    first.save(file, save_all=True, append_images=others, duration=100)


def write_video(file: Path, count: int) -> None:
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    for i in range(count):
        writer.write(np.full((48, 64, 3), 10 + 15 * i, np.uint8))
    writer.release()


def test_a_folder_of_all_kinds(verb, run_of_a_detector, tmp_path):
    """Before: GIFs, videos and what else is no image were left out without a word, and the status
    was 0 whatever could not be read."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    cv2.imwrite(str(source / "a.png"), picture(0))
    cv2.imwrite(str(source / "a.jpg"), picture(1))
    write_gif(source / "d.gif", 3)
    write_video(source / "v.avi", 4)
    for name in ("b.heic", "n.txt", "m.txt", "plain", "broken.jpg", "w.mp4"):
        (source / name).write_bytes(b"nothing of the kind")
    (source / "gone.png").symlink_to("nowhere")
    os.mkfifo(source / "pipe.png")
    done = verb("predict", f"--workdir={run_of_a_detector}", f"--source={source}", f"--out={out}")
    assert done.status == 1 and "Traceback" not in done.err, done
    assert "1 .heic" in done.out and "2 .txt" in done.out and "1 without a suffix" in done.out
    assert "1 folder" in done.out and "1 broken link" in done.out and "1 pipe" in done.out
    assert done.out.count("skipped: ") == 2
    assert f"skipped: {source / 'broken.jpg'}" in done.out
    assert f"skipped: {source / 'w.mp4'}: no frames" in done.out
    assert "error: 2 files of it could not be used" in done.err
    results = json.loads((out / "detections.json").read_text())
    names = [(r["file"], r.get("frame")) for r in results]
    frames = [("d.gif", 1), ("d.gif", 2), ("d.gif", 3), *[("v.avi", i) for i in range(1, 5)]]
    assert names == [("a.jpg", None), ("a.png", None), *frames]
    stems = ("a.jpg", "a.png", "d_000003", "v_000001", "v_000004")
    drawn = {"v.avi", *(f"{stem}.png" for stem in stems)}
    assert drawn <= {p.name for p in out.iterdir()} and len(list(out.glob("[!.]*"))) == 11
    assert f"{source / 'v.avi'}: 4 frames drawn in {out / 'v.avi'}" in done.out
    assert done.out.splitlines()[-1].startswith("speed: ") and "over 8 images at 64 px" in done.out
    # One that is whole ends with 0; none that can be used, with 1.
    one = ("predict", f"--workdir={run_of_a_detector}", f"--out={tmp_path / 'one'}")
    assert verb(*one, f"--source={source / 'd.gif'}").status == 0
    verb(*one, f"--source={source / 'w.mp4'}").refused("none of the 1 files of")
    done = verb(*one, f"--source={source / 'v.avi'}", "--codec=XXXX")
    done.refused("cannot write .avi with the codec XXXX", "--nosave_video")
    done = verb(*one, f"--source={source / 'v.avi'}", "--codec=XXXX", "--nosave_video")
    assert done.status == 0 and not (tmp_path / "one" / "v.avi").exists()


def test_the_shared_folder_of_all_kinds(verb, run_of_a_detector, shared, tmp_path):
    done = verb(
        "predict", f"--workdir={run_of_a_detector}", f"--out={tmp_path}",
        f"--source={shared / 'cases' / '11_predict_mix'}",
    )  # fmt: skip
    assert done.status == 1 and "Traceback" not in done.err, done
    assert "left out of" in done.out and "1 .heic" in done.out and "1 folder" in done.out
    for name in ("empty.jpg", "text.jpg", "v.mp4"):
        assert f"11_predict_mix/{name}" in done.out
    results = json.loads((tmp_path / "detections.json").read_text())
    found = [r["file"] for r in results]
    assert {"A.JPG", "A.png", "cmyk.jpg", "d.gif", "orient6.tif"} <= set(found)


def test_frames_of_a_video_one_at_a_time(tmp_path):
    write_video(tmp_path / "v.avi", 3)
    found = list(movies.frames(tmp_path / "v.avi"))
    assert [f.shape for f in found] == [(48, 64, 3)] * 3
    means = [f.mean() for f in found]
    assert means == pytest.approx([10, 25, 40], abs=4)
    write_gif(tmp_path / "d.gif", 2)
    for frame, seed in zip(movies.frames(tmp_path / "d.gif"), (0, 1), strict=True):
        assert np.abs(frame.astype(int) - picture(seed)).mean() < 30  # 256 colours


@pytest.mark.parametrize("name", ["v.avi", "d.gif"])
def test_a_video_that_is_cut_off(tmp_path, name):
    file = tmp_path / name
    (write_gif if name == "d.gif" else write_video)(file, 12)
    whole = file.read_bytes()
    for part in (0.001, 0.3, 0.6):
        file.write_bytes(whole[: int(len(whole) * part)])
        count = 0
        with pytest.raises(data.DataError, match=name):
            for _ in movies.frames(file):
                count += 1
        assert count < 12


def test_a_list_of_other_files_is_no_video(tmp_path):
    """The decoder would open what the list names."""
    write_video(tmp_path / "v.avi", 2)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'v.avi'}'\n")
    (tmp_path / "m.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.avi\n")
    for name in ("list.mp4", "m.mp4"):
        with pytest.raises(data.DataError, match="does not begin like"):
            next(movies.frames(tmp_path / name))


def test_names_that_frames_would_take(tmp_path):
    paths = [
        tmp_path / name for name in ("d.gif", "d.mp4", "e.gif", "e_000001.png", "e.gif_000001.png")
    ]
    targets = files.targets_of(tmp_path / "out", paths)
    assert len(set(targets.values())) == 5
    stills = {targets[p].name for p in paths[3:]}
    for movie in paths[:3]:
        assert f"{targets[movie].name}_000001" not in stills


def test_a_decoder_that_fails_in_its_own_way_does_not_end_the_folder(tmp_path, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        cv2.imwrite(str(tmp_path / name), picture(0))
    read = data.read_image

    def odd(path):
        if path.name == "b.png":
            raise OverflowError("of its own")
        return read(path)

    monkeypatch.setattr(data, "read_image", odd)
    failed: list[str] = []
    found = [
        one.facts["file"]
        for one in files.samples(sorted(tmp_path.iterdir()), files.read_pictures, failed)
    ]
    assert found == ["a.png", "c.png"]
    assert failed == [f"{tmp_path / 'b.png'}: cannot be read (OverflowError: of its own)"]


# --- Systems that refuse. ---


def test_places_that_cannot_be_written(verb, run_of_a_detector, tmp_path):
    """Before: tracebacks of NotADirectoryError and others."""
    (tmp_path / "file").write_text("")
    cv2.imwrite(str(tmp_path / "a.png"), picture(0))
    below = tmp_path / "file" / "below"
    workdir = f"--workdir={run_of_a_detector}"
    verb("evaluate", f"--workdir={below}").refused("no such folder")
    verb("predict", workdir, f"--source={tmp_path / 'a.png'}", f"--out={below}").refused(
        str(tmp_path / "file"), "is a file, not a folder"
    )
    file = str(tmp_path / "file")
    verb("predict", workdir, f"--source={tmp_path / 'a.png'}", f"--out={file}").refused(
        file, "there is a file of this name where a folder is to be"
    )
    done = verb("export", workdir, f"--out={below}", "--platforms=cpu", "--batch=1")
    done.refused(str(below))
    verb("convert", f"--from={run_of_a_detector}", f"--to={below}").refused(str(below))
    verb("pack", f"--config={QUICK}", f"--out={below}").refused(str(tmp_path / "file"))


def test_too_many_open_files_and_files_too_large(verb, run_of_a_detector, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture(0, (200, 300)))
    done = verb(
        "predict", f"--workdir={run_of_a_detector}", f"--source={tmp_path / 'a.png'}",
        f"--out={tmp_path / 'out'}", limits={"RLIMIT_FSIZE": 20_000},
        env={"JAX_COMPILATION_CACHE_DIR": ""},
    )  # fmt: skip
    assert done.status == 1 and "Traceback" not in done.err, done.err
    assert "larger than a file may be" in done.err, done.err
    made = tmp_path / "m.safetensors"
    done = verb("convert", f"--from={run_of_a_detector}", f"--to={made}",
                limits={"RLIMIT_FSIZE": 20_000})  # fmt: skip
    done.refused("m.safetensors", "larger than a file of this process may be (20,000 bytes)")
    assert not list(tmp_path.glob("m.*"))
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name in "ab":
        cv2.imwrite(str(tmp_path / "images" / f"{name}.png"), picture(0, (200, 300)))
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [cat]\n")
    done = verb("pack", f"--config={QUICK}", f"--config.data.path={tmp_path / 'data.yaml'}",
                f"--out={tmp_path / 'packed'}", limits={"RLIMIT_FSIZE": 20_000})  # fmt: skip
    done.refused("packed", "larger than a file of this process may be (20,000 bytes)")
    assert not list(tmp_path.glob("packed*"))


@pytest.mark.slow
def test_training_on_a_full_disk_says_so_in_one_line(verb, tmp_path):
    """Both saves fail; a thousand lines of the library's came before ours, or in its place."""
    done = verb(
        "train", f"--config={QUICK}", "--config.model=tiny-t", "--config.data.image_size=64",
        "--config.nbs=4", "--config.bn_group=2", "--config.microbatch=2", "--config.steps=4",
        "--config.checkpoint.every=2", "--config.eval.every=2", "--config.log.report=False",
        "--config.log.tensorboard=False", f"--workdir={tmp_path / 'run'}",
        limits={"RLIMIT_FSIZE": 20_000}, env={"JAX_COMPILATION_CACHE_DIR": ""},
    )  # fmt: skip
    assert done.status == 1 and "Traceback" not in done.err, done.err
    [line] = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "cannot save a checkpoint in" in line and "larger than a file of this pro" in line
    assert done.err.splitlines()[-1] == line


def test_a_reader_that_is_gone(verb):
    """As `| head` leaves it. Before: a traceback of BrokenPipeError, and another at the end."""
    done = verb("train", "--help", out="pipe")
    assert done.status == 128 + signal.SIGPIPE and done.err == ""
    done = verb("train", "epochs=50", err="pipe")
    assert done.status == 2
    done = verb("train", "--help", out="pipe", err="pipe")
    assert done.status == 128 + signal.SIGPIPE


def test_a_full_disk_below_stdout(verb):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    verb("train", "--help", out="/dev/full").refused("the disk is full")


def test_closed_streams(verb):
    """Before: the error of a verb without stderr was a crash, or went nowhere."""
    done = verb("train", "epochs=50", err=None)
    assert done.status == 2 and "did you mean --config.epochs=50?" in done.out
    done = verb("train", "epochs=50", out=None)
    done.refused("did you mean", status=2)
    assert verb("train", "--help", out=None, err=None).status == 0
    assert verb("train", "epochs=50", out=None, err=None).status == 2


def test_a_stdout_that_cannot_say_a_name(verb, run_of_a_detector, tmp_path):
    """Before: UnicodeEncodeError."""
    source = tmp_path / "source"
    source.mkdir()
    cv2.imwrite(str(source / "a.png"), picture(0))
    names = ["bild \u00fc \u56fe.png", os.fsdecode(b"bad\xff.png")]
    for name in names:
        shutil.copy(source / "a.png", source / name)
    for encoding in ("ascii", "utf-8"):
        done = verb(
            "predict", f"--workdir={run_of_a_detector}", f"--source={source}",
            f"--out={tmp_path / encoding}", encoding=encoding,
        )  # fmt: skip
        assert done.status == 0, done
        assert "a.png: " in done.out and "bad\\xff.png: " in done.out
    results = json.loads((tmp_path / "ascii" / "detections.json").read_text())
    assert {r["file"] for r in results} == {"a.png", *names}


def test_ctrl_c_while_it_starts(verb, tmp_path):
    """Quiet, with 130; before: a traceback of wherever it was."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(60)\n")
    done = verb("plan", f"--config={slow}", stop=0.3)
    assert (done.status, done.err) == (130, "")


def test_ctrl_c_while_it_imports(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "jaxaccum.evaluate", "--workdir=x"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.rstrip().endswith("| jax") or "jax._src" in line:  # in the middle of the imports
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


def test_a_process_with_closed_streams_of_its_own():
    """Through the real start: nothing that is opened later may get the number of a stream."""
    done = subprocess.run(
        f"exec {sys.executable} -m jaxaccum.evaluate epochs=3 2>&- <&-",
        shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "'epochs=3' is no flag" in done.stdout


def test_shipped_configs_say_what_they_are():
    for file, told in config_files.shipped():
        assert told and len(told) < 110, file
