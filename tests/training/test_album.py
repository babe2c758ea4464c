"""The pictures and the report of a run: there, whole, of the best weights, and no run's end."""

import base64
import html
import html.parser
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import tiny_completion
from tiny import tiny_config, tiny_config3d

from jaxaccum import data, tasks, train
from jaxaccum.draw import figures
from jaxaccum.training import album, logs, report

NAMES = {"batch", "labels", "validation", "results", "precision_recall", "confusion"}


class Parsed(html.parser.HTMLParser):
    """The images of a page, and whether it asks for anything from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.images, self.elsewhere, self.titles = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            kind, _, data = found["src"].partition(",")
            assert kind == "data:image/png;base64"
            pixels = np.frombuffer(base64.b64decode(data), np.uint8)
            self.images.append(cv2.imdecode(pixels, cv2.IMREAD_COLOR))
        self.elsewhere += [found[key] for key in ("href", "srcset") if key in found]
        self.elsewhere += [tag] * (tag in ("script", "link", "iframe"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("album") / "a <run>"
    train.train(tiny_config(**{"log.report": True}), workdir)
    return workdir


def test_all_pictures_are_there_and_none_is_blank(reported):
    assert {file.stem for file in (reported / album.FOLDER).iterdir()} == NAMES
    for file in (reported / album.FOLDER).iterdir():
        assert cv2.imread(str(file)).std() > 5, file


def test_the_report_holds_all_that_it_shows(reported):
    text = (reported / "report.html").read_text()
    page = Parsed(text)
    assert len(page.images) == len(NAMES) and all(image.std() > 5 for image in page.images)
    assert page.elsewhere == [] and "<title>tiny-t in a &lt;run&gt;</title>" in text
    records = logs.records(reported / "metrics.jsonl")
    assert f"Recipe {records[0]['fingerprint']}" in text
    for said in ("microbatch 2 x 2 steps x 1 device", "AP50-95", "balloon", "jaxlib", "&quot;nbs"):
        assert said in text, said


def test_it_is_as_it_was_after_a_start_that_finds_all_done(reported):
    before = (reported / "report.html").read_bytes()
    train.train(tiny_config(**{"log.report": True}), reported)
    assert (reported / "report.html").read_bytes() == before


@pytest.mark.slow
def test_what_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch, capsys):
    def broken(*given, **named):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(figures, "curves", broken)
    train.train(tiny_config(**{"log.report": True, "steps": 6}), tmp_path)
    said = capsys.readouterr().out
    assert said.count("the report is not whole (RuntimeError: no fonts here)") == 1
    assert not (tmp_path / "report.html").exists()


def test_without_a_report_there_is_none(tmp_path):
    train.train(tiny_config(steps=2, **{"eval.every": -1}), tmp_path)
    assert not (tmp_path / album.FOLDER).exists() and not (tmp_path / "report.html").exists()


# A page as a browser sees it: a script at its end writes into it what came of every image, and
# errors.
SEEN = """<pre id=seen></pre><script>
const errors = []; addEventListener("error", (e) => errors.push(e.message), true);
addEventListener("load", () => {
  const shades = (i) => {
    const c = document.createElement("canvas");
    c.width = i.naturalWidth; c.height = i.naturalHeight;
    const d = c.getContext("2d"); d.drawImage(i, 0, 0);
    return new Set(d.getImageData(0, 0, c.width, c.height).data).size;
  };
  const images = [...document.images].map((i) => [i.naturalWidth, i.naturalHeight,
    Math.round(i.getBoundingClientRect().width), shades(i)]);
  const wide = document.documentElement.scrollWidth <= innerWidth;
  document.getElementById("seen").textContent =
    `seen:${JSON.stringify({images, errors, wide})}:end`;
});
</script>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def opened(file, tmp_path):
    """A page as a browser opens it: sizes of its images, errors, and whether it fits its width."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here, which would open the report")
    page = tmp_path / "page.html"
    page.write_text(file.read_text() + SEEN)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000",
               "--window-size=1200,900", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search("seen:({.*}):end", done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def looked_at(file, tmp_path, count):
    seen = opened(file, tmp_path)
    assert seen["errors"] == [] and seen["wide"] and len(seen["images"]) == count
    for width, height, shown, shades in seen["images"]:
        assert width > 100 and height > 50 and 100 < shown <= 1100 and shades > 20


def test_a_browser_shows_all_of_it(reported, tmp_path):
    looked_at(reported / "report.html", tmp_path, len(NAMES))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "said"),
    [(tiny_config3d, "mean absolute error"), (tiny_completion.tiny_config, "CD-L1")],
    ids=["3d", "clouds"],
)
def test_the_other_tasks_have_one(config, said, tmp_path):
    train.train(config(**{"log.report": True, "steps": 3}), tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Parsed(text)
    assert {f.stem for f in (tmp_path / album.FOLDER).iterdir()} == {
        "batch", "labels", "validation", "results"
    }  # fmt: skip
    assert len(page.images) == 4 and all(image.std() > 5 for image in page.images)
    assert said in text
    looked_at(tmp_path / "report.html", tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "path", "changes"),
    [
        (tiny_config, "detect2d/bccd/data.yaml", {"data.max_objects": 128}),
        (tiny_config3d, "detect3d/kitti", {}),
        (tiny_completion.tiny_config, "completion/sweethome3d:ShapeNet-34",
         {"eval.viewpoints": 1, "eval.unseen": "auto"}),
    ],
    ids=["BCCD", "KITTI", "furniture"],
)  # fmt: skip
def test_a_browser_shows_that_of_a_real_set(config, path, changes, shared, tmp_path):
    changes = changes | {"data.path": str(shared / "data" / path), "log.report": True, "steps": 3}
    train.train(config(**changes), tmp_path)
    count = len(Parsed((tmp_path / "report.html").read_text()).images)
    assert count >= 4
    looked_at(tmp_path / "report.html", tmp_path, count)


@pytest.mark.slow
def test_samples_in_space_are_drawn_as_they_are_learned():
    """Boxes lie on the objects after the image was turned round, and a padded row draws nothing."""
    task = tasks.of(tiny_config3d()).create(tiny_config3d(), data.open_source3d("", "train").names,
                                            np.dtype(np.float32))  # fmt: skip
    source = data.open_source3d("", "train")
    batch = next(iter(data.eval_batches3d(source, size=task.size, batch=4)))
    drawn = task.drawn_samples(source, batch, 3)
    assert len(drawn) == 3
    for i, picture in enumerate(drawn):
        assert picture.shape == batch["image"][i].shape
        assert (picture != batch["image"][i]).any() == bool(batch["valid"][i].any())
    batch["weight"][1:] = 0
    assert len(task.drawn_samples(source, batch, 3)) == 1


def test_lines_that_are_none_are_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(
        b'{"step": 1, "kind": "train", "loss": 2.0}\n\nx\n[1]\n\xff\x00\n{"step": 2, "ki'
    )
    assert logs.records(tmp_path / "m.jsonl") == [{"step": 1, "kind": "train", "loss": 2.0}]
    assert report.results([], "map50").ndim == 3
