"""The pictures and the report of a run: there, whole, of the best weights, and no run's end."""

import base64
import html.parser
import re

import cv2
import numpy as np
import pytest
from tiny import tiny_config, tiny_config3d

from jaxaccum import train
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


@pytest.mark.slow
@pytest.mark.long
def test_another_task_has_one(tmp_path):
    changes = {"log.report": True, "steps": 3, "data.path": ""}
    train.train(tiny_config3d(**changes), tmp_path)
    page = Parsed((tmp_path / "report.html").read_text())
    assert len(page.images) >= 2
    assert re.search(r"mean absolute error", (tmp_path / "report.html").read_text())


def test_lines_that_are_none_are_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(
        b'{"step": 1, "kind": "train", "loss": 2.0}\n\nx\n[1]\n\xff\x00\n{"step": 2, "ki'
    )
    assert logs.records(tmp_path / "m.jsonl") == [{"step": 1, "kind": "train", "loss": 2.0}]
    assert report.results([], "map50").ndim == 3
