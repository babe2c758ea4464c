"""Every command that README and docs show is in documented.toml, and what needs no GPU, no network
and no weights of others runs as it is shown, in the order of its page, on small data, and says what
the page says that it says, numbers aside.

A command or an output that a page shows and the table lacks is an error, and the other way round.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from torch_files import TorchFile

from jaxaccum.data.synthetic import streets
from jaxaccum.data.synthetic.scenes import Scenes
from jaxaccum.data.synthetic.shapes import Shapes

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KNOWN = tomllib.loads((HERE / "documented.toml").read_text())
SMALL, OUTPUTS = KNOWN.pop("small"), KNOWN.pop("outputs")
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def shown(page: str) -> list[str]:
    """The commands in a page's bash blocks, each on one line, without its comment."""
    found = []
    text = (ROOT / page).read_text()
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if block.startswith("for "):
            found.append(" ".join(block.split()))
            continue
        block = re.sub(r"\s+#.*$", "", block, flags=re.MULTILINE)
        block = re.sub(r"\s+\\\n\s+|\n\s+(?=\[)", " ", block)
        found += [line.strip() for line in block.splitlines() if line.strip()]
    return found


def blocks(page: str) -> list[str]:
    """The other blocks of a page: what commands say, folders, formulas."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if not language]


@pytest.mark.parametrize("page", PAGES)
def test_the_table_has_what_the_page_shows(page):
    assert shown(page) == [entry["command"] for entry in KNOWN.get(page, [])]
    known = [output for output in OUTPUTS if output["page"] == page]
    assert len(blocks(page)) == len(known)
    for block, output in zip(blocks(page), known, strict=True):
        assert block.startswith(output["begins"]), page


def test_the_table_names_pages_and_tests_that_exist():
    assert set(KNOWN) <= set(PAGES)
    for page, entries in KNOWN.items():
        for entry in entries:
            assert ("says" in entry) != ("not_run" in entry), (page, entry)
            for file in re.findall(r"[\w/]+\.(?:py|md)\b", entry.get("not_run", "")):
                assert (ROOT / file).is_file(), (page, file)
    for output in OUTPUTS:
        assert {*output} & {"after", "command", "not_compared"}, output
        page = output.get("by", output["page"])
        for file in re.findall(r"[\w/]+\.(?:py|md)\b", output.get("not_compared", "")):
            assert (ROOT / file).is_file(), (page, file)
        assert output.get("command", "") in (ROOT / page).read_text()
        if "after" in output:
            (entry,) = [e for e in KNOWN[page] if e["command"].startswith(output["after"])]
            assert "says" in entry, output


def masked(line: str) -> str:
    """A line without its numbers and the width of its columns."""
    line = re.sub(r"\b[0-9a-f]{8}\b|\d[\d,.]*(e[+-]\d+)?(?<![,.])", "#", line)
    return " ".join(line.split())


def missing(output: dict, said: str) -> list[str]:
    """The lines of a page's block that are not in what was said, in that order."""
    (block,) = [b for b in blocks(output["page"]) if b.startswith(output["begins"])]
    rest, lacking, last = iter([masked(line) for line in said.splitlines()]), [], ""
    for line in block.splitlines():
        if line in ("", "...") or line.startswith(tuple(output.get("may_lack", ()))):
            continue
        for word, other in output.get("instead", {}).items():
            line = line.replace(word, other)
        if masked(line) != last and masked(line) not in rest:
            lacking.append(line)
            rest = iter([masked(line) for line in said.splitlines()])
        last = masked(line)
    return lacking


def test_what_is_missing_in_an_output_is_found():
    page, begins = "docs/your_model.md", "eval   160/640"
    output = {"page": page, "begins": begins}
    assert (
        missing(output, "eval 2/2 | accuracy 0.1\nbest: update 2, accuracy 1 in runs/classes/best")
        == []
    )
    assert missing(
        output, "best: update 2, accuracy 1 in runs/classes/best\neval 2/2 | accuracy 0.1"
    ) == ["best: update 640, accuracy 0.5185 in runs/classes/best"]
    assert len(missing(output, "eval 2/2 | precision 0.1")) == 2
    assert masked("recipe 3d28b7fd: 1,024 x 1.7e-14, 5 s.") == "recipe #: # x #, # s."


def write_images(folder: Path) -> None:
    for split, count in {"train": 8, "val": 4}.items():
        scenes = Scenes(split, length=count, size=64)
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(folder / "images" / split / f"{i}.png"), scenes.image(i)[..., ::-1])
            objects, (height, width) = scenes.objects(i), scenes.size(i)
            x1, y1, x2, y2 = np.transpose(objects.boxes / [width, height, width, height])
            rows = zip(objects.classes, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, strict=True)
            text = "".join("{} {:.6f} {:.6f} {:.6f} {:.6f}\n".format(*row) for row in rows)
            (folder / "labels" / split / f"{i}.txt").write_text(text)
    names = ", ".join(scenes.names)
    (folder / "data.yaml").write_text(
        f"path: .\ntrain: images/train\nval: images/val\nnames: [{names}]\n"
    )


def write_coco(folder: Path) -> None:
    """COCO's layout, 8 and 4 images."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in {"train": 8, "val": 4}.items():
        scenes = Scenes(split, length=count, size=64)
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            file, (height, width) = f"{i:012d}.jpg", scenes.size(i)
            cv2.imwrite(str(folder / f"{split}2017" / file), scenes.image(i)[..., ::-1])
            images.append({"id": i, "file_name": file, "height": height, "width": width})
            objects = scenes.objects(i)
            for kind, (x1, y1, x2, y2) in zip(objects.classes, objects.boxes.tolist(), strict=True):
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": int(kind) + 1,
                     "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
                     "iscrowd": 0}
                )  # fmt: skip
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(scenes.names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_pcd(file: Path, points: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = (
        "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nHEIGHT 1\n"
        f"WIDTH {len(points)}\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\nDATA binary\n"
    )
    file.write_bytes(header.encode() + np.ascontiguousarray(points, "<f4").tobytes())


def write_pcn(folder: Path) -> None:
    """PCN's layout, two categories, four shapes of training with eight views each."""
    shapes, taken, index = Shapes("train", length=8), 0, []
    for synset, name in (("04379243", "table"), ("03001627", "chair")):
        splits = {"train": [f"{name}1", f"{name}2"], "val": [f"{name}3"], "test": [f"{name}4"]}
        index.append({"taxonomy_id": synset, "taxonomy_name": name, **splits})
        for split, model in [(split, model) for split, names in splits.items() for model in names]:
            points = shapes.complete(taken)
            taken += 1
            write_pcd(folder / split / "complete" / synset / f"{model}.pcd", points)
            for view in range(8 if split == "train" else 1):
                part = points[points @ np.random.default_rng(view).normal(size=3) > 0]
                write_pcd(folder / split / "partial" / synset / model / f"{view:02d}.pcd", part)
    (folder / "PCN.json").write_text(json.dumps(index))


def write_clouds(folder: Path) -> None:
    """ShapeNet's layout: chairs, tables and, unseen, rockets."""
    (folder / "shapenet_pc").mkdir(parents=True)
    lists: dict[str, list[str]] = {"ShapeNet-34/train": [], "ShapeNet-34/test": [],
                                   "ShapeNet-Unseen21/test": []}  # fmt: skip
    shapes = Shapes("train", length=6)
    for i in range(6):
        synset = ("03001627", "04379243")[i % 2] if i < 5 else "04099429"
        name = f"{synset}-shape{i}.npy"
        np.save(folder / "shapenet_pc" / name, shapes.complete(i))
        which = "ShapeNet-34/train" if i < 4 else "ShapeNet-34/test" if i < 5 else None
        lists[which or "ShapeNet-Unseen21/test"].append(name)
    lists |= {f"ShapeNet-55/{split}": lists[f"ShapeNet-34/{split}"] for split in ("train", "test")}
    for name, rows in lists.items():
        file = folder / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{row}\n" for row in rows))
    (folder / "ShapeNet55-34").symlink_to(folder)


def write_street_pictures(folder: Path) -> None:
    streets.write(folder, train=6, val=2, size=(96, 320))
    (folder / "ImageSets").rename(folder / "training" / "ImageSets")
    for kind in ("image_2", "calib"):
        (folder / "testing" / kind).mkdir(parents=True)
        for file in sorted((folder / "training" / kind).iterdir())[:2]:
            shutil.copy(file, folder / "testing" / kind)


@pytest.fixture
def world(tmp_path):
    """A folder in which the pages' commands find what they name."""
    for name in ("configs", "scripts", "examples", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_images(tmp_path / "DIR")
    for name in ("cells", "mine", "BCCD"):
        (tmp_path / name).symlink_to("DIR")
    for name in ("new", "photos"):
        (tmp_path / name).symlink_to("DIR/images/val")
    write_coco(tmp_path / "COCO")
    write_clouds(tmp_path / "DATA")
    write_pcn(tmp_path / "PCN")
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "chair.npy", Shapes("val", length=1).complete(0)[:2048])
    write_street_pictures(tmp_path / "KITTI")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "as_shown.py"}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def run(command: str, folder: Path, path: str = "") -> str:
    """What a command says; it has to end well, without a warning of ours."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), path))),
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    assert not re.search(r"^(error|warning): |Traceback", done.stdout, re.MULTILINE), done.stdout
    return done.stdout


RUN = [
    page
    for page in PAGES
    if any("says" in entry for entry in KNOWN.get(page, []))
    or any("command" in output for output in OUTPUTS if output["page"] == page)
]
MINUTES = ("docs/completion.md", "docs/tutorials/small_memory.md")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.long] * (p in MINUTES)) for p in RUN]
)
def test_the_commands_of(page, world):
    entries = KNOWN.get(page, [])
    if any("yolo11n.pt" in entry["command"] for entry in entries):
        write_weights(world)
    path, silent = "", []
    for entry in entries:
        if entry["command"].startswith("export PYTHONPATH="):
            path = entry["command"].partition("=")[2]
        if "says" in entry:
            more = [SMALL[name] for name in entry.get("small", ())] + [entry.get("more", "")]
            said = run(" ".join([entry["command"], *more]), world, path)
            for output in OUTPUTS:
                after = output.get("after", "\0")
                if page == output.get("by", output["page"]) and entry["command"].startswith(after):
                    silent += [f"{entry['command']}: no {line}" for line in missing(output, said)]
            if entry["says"] not in said:
                silent.append(f"{entry['command']}\n{said[-1500:]}")
            silent += [
                f"{entry['command']}: no {file}"
                for file in entry.get("makes", ())
                if not (world / file).exists()
            ]
    for output in OUTPUTS:
        if page == output["page"] and "command" in output:
            said = run(f"{output['command']} {output.get('more', '')}", world)
            silent += [f"{output['command']}: no {line}" for line in missing(output, said)]
    assert not silent, "\n\n".join(silent)


def write_weights(folder: Path) -> None:
    """yolo11n.pt, the state dict of random weights as torch.save writes it."""
    tiny.untrained(folder / "random", tiny.tiny_config(model="yolo11-n"), tuple("abc"))
    run("python -m jaxaccum.convert --from=random --to=random.safetensors", folder)
    weights, file = load_file(folder / "random.safetensors"), TorchFile()
    file.write(folder / "yolo11n.pt", {name: file.tensor(value) for name, value in weights.items()})
