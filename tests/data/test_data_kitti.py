"""KITTI's folders and TFDS's KITTI are read alike, and every mistake is named with its cure."""

import os
import pickle
import shlex
import shutil

import cv2
import numpy as np
import pytest

from jaxaccum.data import DataError
from jaxaccum.data.formats.kitti import (
    DEFAULT_CAMERA,
    NAMES,
    KittiSource,
    TfdsKittiSource,
    class_id,
    open_kitti,
    read_calibration,
    write_split,
)
from jaxaccum.data.formats.tfds import TfdsSource

CAR = "Car 0.10 1 -1.50 10.00 5.00 30.00 20.00 1.50 1.60 4.00 1.00 1.70 12.00 -1.60"
REGION = "DontCare -1 -1 -10 1.00 1.00 4.00 4.00 -1 -1 -1 -1000 -1000 -1000 -10"
P2 = "P2: 50 0 32 4.5 0 50 16 0.2 0 0 1 0.003"


def row(kind="Car", box="10 5 30 20", size="1.5 1.6 4", place="1 1.7 12 -1.6"):
    return f"{kind} 0 0 -1.5 {box} {size} {place}"


def kitti(root, labels, *, calibration=P2, split="train", suffix=".png", folder="training"):
    """Writes frames 000000, 000001, ... of 64 x 32: label texts, or None for no label file."""
    place = root / folder
    for name in ("image_2", "label_2", "calib"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets").mkdir(exist_ok=True)
    for i, text in enumerate(labels):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 64, 3), np.uint8)
        cv2.imwrite(str(place / "image_2" / f"{i:06d}{suffix}"), pixels)
        (place / "calib" / f"{i:06d}.txt").write_text(f"P0: 1\n{calibration}\n")
        if text is not None:
            (place / "label_2" / f"{i:06d}.txt").write_text(text)
    listing = "".join(f"{i:06d}\n" for i in range(len(labels)))
    (root / "ImageSets" / f"{split}.txt").write_text(listing)
    return root


@pytest.fixture
def real(shared):
    folder = shared / "data" / "detect3d" / "kitti"
    if not folder.is_dir():
        pytest.skip(f"KITTI's development frames are not at {folder}")
    return folder


# --- folders ---


def test_rows_become_objects_and_labels(tmp_path):
    text = f"{CAR}\n\n{REGION}\n{row('Person_sitting', '0 0 8 9')}\n"
    source = KittiSource(kitti(tmp_path, [text, ""]), "train")
    assert source.names == NAMES and len(source) == 2 and source.name(0) == "000000.png"
    objects = source.objects(0)
    assert objects.classes.tolist() == [0, 7]
    np.testing.assert_allclose(objects.boxes, [[10, 5, 30, 20], [0, 0, 8, 9]])
    np.testing.assert_allclose(objects.dimensions, [[1.5, 1.6, 4]] * 2, rtol=1e-6)
    np.testing.assert_allclose(objects.locations, [[1, 1.7, 12]] * 2, rtol=1e-6)
    np.testing.assert_allclose(objects.yaw, [-1.6] * 2, rtol=1e-6)
    labels = source.labels(0)
    assert labels.kinds == ("Car", "DontCare", "Person_sitting")
    assert labels.occlusion.tolist() == [1, -1, 0] and labels.truncation[0] == np.float32(0.1)
    np.testing.assert_allclose(
        source.camera(0), [[50, 0, 32, 4.5], [0, 50, 16, 0.2], [0, 0, 1, 0.003]], rtol=1e-6
    )
    assert source.camera(0).dtype == np.float32
    assert len(source.objects(1)) == 0 and source.objects(1).locations.shape == (0, 3)
    report = source.report
    assert (report.images, report.objects, report.backgrounds, report.regions) == (2, 2, 1, 1)
    assert report.lines() == [
        f"{tmp_path} (train): 2 images, 2 objects, 1 images without objects, 1 DontCare regions"
    ]


@pytest.mark.parametrize(("folder", "suffix"), [(".", ".png"), ("training", ".jpg")])
def test_layouts(tmp_path, folder, suffix):
    root = kitti(tmp_path, [CAR], folder=folder, suffix=suffix, split="trainval")
    source = open_kitti(str(root), "trainval")
    assert source.image(0).shape == (32, 64, 3) and source.name(0) == f"000000{suffix}"


def test_classes_by_type(tmp_path):
    kinds = ["Car", "Van", "Truck", "Tram", "Pedestrian", "Person_sitting", "Cyclist", "Misc", "Ox"]
    text = "\n".join(row(kind) for kind in kinds)
    root = kitti(tmp_path, [text])
    plain, merged = KittiSource(root, "train"), KittiSource(root, "train", merge=True)
    assert [NAMES[c] for c in plain.objects(0).classes] == kinds[:-1]
    assert plain.report.skipped == {
        "unknown type 'Ox'": [(str(tmp_path / "training/label_2/000000.txt"), 9)]
    }
    assert merged.objects(0).classes.tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 4]
    assert not merged.report.skipped and merged.names == plain.names == NAMES
    assert merged.identity != plain.identity
    assert class_id("DontCare", merge=True) is None


def test_labels_that_are_no_objects_are_counted_with_their_line(tmp_path):
    text = "\n".join(
        [
            row(),
            "",
            row(),
            row(box="5 5 5 9"),
            row(box="70 5 80 9"),
            row(size="-1 -1 -1"),
            row(box="-5 20 70 40", place="2 1.7 9 0"),
        ]
    )
    source = KittiSource(kitti(tmp_path, [text]), "train")
    np.testing.assert_allclose(source.objects(0).boxes, [[10, 5, 30, 20], [0, 20, 64, 32]])
    np.testing.assert_allclose(source.objects(0).locations[:, 2], [12, 9])
    file = str(tmp_path / "training/label_2/000000.txt")
    assert source.report.skipped == {
        "duplicate label": [(file, 3)],
        "box without area": [(file, 4)],
        "box outside the image": [(file, 5)],
        "object without a 3D box": [(file, 6)],
        "part of a box outside the image, clipped": [(file, 7)],
    }
    assert len(source.labels(0)) == 6


def test_frames_that_lack_a_file_are_counted(tmp_path):
    root = kitti(tmp_path, [CAR] * 5 + [None])
    place = root / "training"
    (place / "image_2/000001.png").unlink()
    (place / "calib/000002.txt").unlink()
    (place / "image_2/000003.png").write_bytes(b"no image")
    (root / "ImageSets/train.txt").write_text(
        "000000\n000001\n\n" + "000002\n000003\n000005\n000000"
    )
    with pytest.raises(DataError, match=r"000003\.png\nReplace them, or set data\.on_error=skip"):
        KittiSource(root, "train")
    source = KittiSource(root, "train", on_error="skip")
    assert len(source) == 1
    assert source.report.skipped == {
        "frame listed again": [(str(root / "ImageSets/train.txt"), 7)],
        "image missing": [(str(place / "image_2/000001.png"), None)],
        "calibration missing": [(str(place / "calib/000002.txt"), None)],
        "image unreadable": [(str(place / "image_2/000003.png"), None)],
        "label file missing": [(str(place / "label_2/000005.txt"), None)],
    }
    shutil.rmtree(place / "calib")
    with pytest.raises(DataError, match=r"no usable image(.|\n)*calibration missing"):
        KittiSource(root, "train")


@pytest.mark.parametrize(
    ("text", "line"), [(f"{CAR}\nCar 0 0\n", 2), (f"\n{row(place='1 x 12 0')}", 2)]
)
def test_malformed_rows_are_refused_or_dropped_with_their_frame(tmp_path, text, line):
    root = kitti(tmp_path, [CAR, text])
    file = str(root / "training/label_2/000001.txt")
    with pytest.raises(DataError, match=f"000001.txt:{line}: ") as error:
        KittiSource(root, "train")
    assert (error.value.file, error.value.line) == (file, line)
    source = KittiSource(root, "train", on_error="skip")
    assert len(source) == 1
    assert source.report.skipped == {
        "frame with an error in its labels or calibration": [(file, line)]
    }


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ("P3: 1 2", r"no row P2"),
        ("P2: 1 2 3", r"000000.txt:2: expected P2: and 12 numbers"),
        ("P2: " + "x " * 12, r"000000.txt:2: expected P2: and 12 numbers"),
        ("P2: " + "nan " * 12, r"000000.txt:2: expected P2: and 12 numbers"),
        ("P2: -5 0 3 0 0 5 3 0 0 0 1 0", r"000000.txt:2: P2 is no camera.* determinant -25"),
    ],
)
def test_wrong_calibrations(tmp_path, calibration, said):
    root = kitti(tmp_path, [CAR], calibration=calibration)
    with pytest.raises(DataError, match=said):
        KittiSource(root, "train")
    with pytest.raises(DataError, match=said):
        read_calibration(root / "training/calib/000000.txt")


def test_files_that_are_no_text(tmp_path):
    for name in ("label_2", "calib"):
        root = kitti(tmp_path, [CAR])
        (root / "training" / name / "000000.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match=f"{name}/000000.txt:1: byte .* is not utf-16"):
            KittiSource(root, "train")


def test_a_missing_list_says_how_to_make_one(tmp_path):
    root = kitti(tmp_path, [CAR] * 10, split="all")
    with pytest.raises(DataError, match=r"train.txt: no such list.* there are all.*write_split"):
        KittiSource(root, "train")
    files = write_split(root, 0.8, seed=3)
    train, val = (file.read_text().split() for file in files)
    assert (len(train), len(val)) == (8, 2)
    assert sorted(train + val) == [f"{i:06d}" for i in range(10)] and train == sorted(train)
    assert len(KittiSource(root, "train")) == 8 and len(KittiSource(root, "val")) == 2
    with pytest.raises(DataError, match="is not overwritten"):
        write_split(root)
    assert files[0].read_text().split() == train
    shutil.rmtree(root / "ImageSets")
    write_split(root, 0.8, seed=3)
    assert files[1].read_text().split() == val
    shutil.rmtree(root / "ImageSets")
    write_split(root, 0.999, seed=4)
    assert len(files[1].read_text().split()) == 1


def test_splits_that_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match="neither training/image_2 nor image_2"):
        write_split(tmp_path)
    root = kitti(tmp_path, [CAR, None], split="all")
    with pytest.raises(DataError, match="1 frames with an image"):
        write_split(root)
    with pytest.raises(DataError, match="fraction is 1, expected"):
        write_split(root, 1)


def test_a_fraction_is_a_seeded_sample(tmp_path):
    root = kitti(tmp_path, [CAR] * 20)

    def names(**options):
        source = KittiSource(root, "train", **options)
        return [source.name(i) for i in range(len(source))]

    part = names(fraction=0.5)
    assert len(part) == 10 and part == sorted(part) and part == names(fraction=0.5)
    assert part != names(fraction=0.5, seed=1) and part != names()[:10]
    assert len(names(fraction=0.001)) == 1
    with pytest.raises(DataError, match="fraction is 0, expected"):
        names(fraction=0)
    with pytest.raises(DataError, match="seed is -1"):
        names(fraction=0.5, seed=-1)


def test_identity_follows_everything_learned_from_and_not_the_place(tmp_path):
    def identity(name, text=CAR, calibration=P2):
        return KittiSource(
            kitti(tmp_path / name, [text], calibration=calibration), "train"
        ).identity

    first = identity("a")
    assert len(first) == 12 and identity("b") == first
    assert identity("c", calibration=P2.replace("50", "51")) != first
    for k, field in enumerate(("0.2", "2", "-1.4", "11", "6", "31", "21", "1.6", "1.7", "4.1")):
        fields = CAR.split()
        fields[k + 1] = field
        assert identity(f"d{k}", " ".join(fields)) != first, k
    for k, field in enumerate(("1.1", "1.8", "13", "-1.7")):
        fields = CAR.split()
        fields[k + 11] = field
        assert identity(f"e{k}", " ".join(fields)) != first, k
    assert identity("f", f"{CAR}\n{REGION}") != first


def test_options_out_of_range(tmp_path):
    root = kitti(tmp_path, [CAR])
    with pytest.raises(DataError, match="on_error is 'ignore'"):
        KittiSource(root, "train", on_error="ignore")
    with pytest.raises(DataError, match="neither training/image_2 nor image_2"):
        KittiSource(tmp_path / "nothing", "train")
    (root / "ImageSets/train.txt").write_text("\n")
    with pytest.raises(DataError, match="the list is empty"):
        KittiSource(root, "train")


def test_sources_pickle(tmp_path):
    source = KittiSource(kitti(tmp_path, [CAR, CAR]), "train")
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.image(1), source.image(1))
    np.testing.assert_array_equal(copy.camera(1), source.camera(1))


# --- what the field has ---


@pytest.mark.parametrize("nested", [True, False])
def test_lists_beside_the_frames_folder_are_found(tmp_path, nested):
    """As the benchmark ships them; it was "no such list", and a random split was advised."""
    root = kitti(tmp_path / "data", [CAR] * 3)
    (root / "ImageSets/val.txt").write_text("000002\n")
    given = root / "training" if nested else root
    train, val = (open_kitti(str(given), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 1) and train.identity == open_kitti(
        str(root), "train"
    ).identity
    assert (str(root / "ImageSets/train.txt") in "".join(train.report.lines())) == nested
    with pytest.raises(DataError, match="there is such a list already"):
        write_split(given)
    # What lies nearer goes before.
    (root / "training/ImageSets").mkdir()
    (root / "training/ImageSets/train.txt").write_text("000001\n")
    assert len(open_kitti(str(root / "training"), "train")) == 1
    assert len(open_kitti(str(root), "train")) == 3


@pytest.mark.parametrize("suffix", [".PNG", ".JPG", ".JPEG", ".Png", ".jpeg"])
def test_suffixes_in_any_case(tmp_path, suffix):
    root = kitti(tmp_path, [CAR, CAR], suffix=suffix)
    for name in ("label_2", "calib"):
        place = root / "training" / name / "000001.txt"
        place.rename(place.with_suffix(".TXT"))
    source = KittiSource(root, "train")
    assert [source.name(i) for i in (0, 1)] == [f"000000{suffix}", f"000001{suffix}"]
    (root / "ImageSets/train.txt").unlink()
    train, val = write_split(root)
    assert train.read_text() + val.read_text() in ("000000\n000001\n", "000001\n000000\n")


def test_objects_that_are_not_before_the_camera_are_counted(tmp_path):
    places = ["1 1.7 -1 0", "1 1.7 0 0", "1 1.7 0.1 0"]
    source = KittiSource(kitti(tmp_path, ["\n".join(row(place=p) for p in places)]), "train")
    assert source.objects(0).locations[:, 2].tolist() == pytest.approx([0.1])
    file = str(tmp_path / "training/label_2/000000.txt")
    assert source.report.skipped == {"object that is not before the camera": [(file, 1), (file, 2)]}
    assert len(source.labels(0)) == 3


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (1, "1e39", "truncation is 1e\\+39"),
        (1, "4", "truncation is 4, expected 0 to 1 or -1 for unknown.*tracking"),
        (1, "-0.5", "truncation is -0.5"),
        (2, "0.5", "occlusion is 0.5, expected a whole number"),
        (3, "1e300", "alpha is 1e\\+300"),
        (4, "-1e300", "left of the box"),
        (6, "1e300", "right of the box"),
        (8, "150", "height is 150, expected 0 to 100 .*in metres"),
        (10, "1e30", "length is 1e\\+30"),
        (9, "-2", "width is -2"),
        (12, "3.5e38", "y of the location is 3.5e\\+38"),
        (13, "99999999999999999999", "z of the location is 1e\\+20"),
        (14, "-1000", "rotation_y is -1000, expected -10 to 10 .*in radians"),
        (14, "90", "rotation_y is 90"),
        (10, "\u0663", "is not a number"),
        (10, "1_0", "'1_0' is not a number"),
        (10, "x" * 3_000_000, "is not a number"),
    ],
)
@pytest.mark.parametrize("line", [CAR, REGION])
def test_values_out_of_range_are_refused_or_dropped_with_their_frame(
    tmp_path, line, column, value, said
):
    """Above float32 they became infinite; the others were learned from."""
    fields = line.split()
    fields[column] = value
    root = kitti(tmp_path, [f"{CAR}\n{' '.join(fields)}\n", CAR])
    with pytest.raises(DataError, match=f"000000.txt:2: .*{said}") as error:
        KittiSource(root, "train")
    assert error.value.line == 2 and len(str(error.value)) < 500
    source = KittiSource(root, "train", on_error="skip")
    assert len(source) == 1
    assert [len(v) for v in source.report.skipped.values()] == [1]


@pytest.mark.parametrize("end", ["\x0c", "\u2028", "\x85", "\x1c"])
def test_only_ends_of_lines_end_lines(tmp_path, end):
    """A form feed made rows of one line, and moved the numbers of the others."""
    root = kitti(tmp_path, [f"{CAR}{end}\n\n{CAR} x"])
    with pytest.raises(DataError, match=r"000000.txt:3: 16 fields|000000.txt:3: .*not a number"):
        KittiSource(root, "train")
    root = kitti(tmp_path, [f"{CAR}{end}{CAR}"])
    with pytest.raises(DataError, match=r"000000.txt:1: 30 fields"):
        KittiSource(root, "train")


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        (P2.replace("50 0 32", "7.2e22 0 32"), "it has 7.2e\\+22"),
        (P2.replace("0 0 1 ", "0 0 3.5e38 "), "it has 3.5e\\+38"),
        (P2.replace("0 0 1 ", "0 2 1 "), "third row"),
        (P2.replace("50 0 32", "2e5 0 32"), "focal lengths are 200000 and 50"),
        (P2.replace("50 0 32", "0.1 0 32"), "focal lengths are 0.1 and 50"),
        (P2.replace("50", "-50"), "focal lengths are -50 and -50"),
        (P2.replace("50", "5_0"), "expected P2: and 12 numbers"),
        (P2.replace("50", "\u0665\u0660"), "expected P2: and 12 numbers"),
        ("P2: " + "9" * 3_000_000, "expected P2: and 12 numbers"),
    ],
)
def test_projections_that_no_camera_has(tmp_path, calibration, said):
    root = kitti(tmp_path, [CAR], calibration=calibration)
    with pytest.raises(DataError, match=f"000000.txt:2: .*{said}") as error:
        KittiSource(root, "train")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["label_2", "calib"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_texts_that_are_no_files(tmp_path, name, kind):
    """A folder was "missing"; a pipe, too."""
    root = kitti(tmp_path, [CAR, CAR])
    place = root / "training" / name / "000000.txt"
    place.unlink()
    said = {
        "folder": "a folder, expected a file",
        "fifo": "a pipe",
        "link": "where there is nothing",
    }
    if kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to("nowhere.txt")
    with pytest.raises(DataError, match=said[kind]):
        KittiSource(root, "train")
    source = KittiSource(root, "train", on_error="skip")
    assert len(source) == 1 and list(source.report.skipped.values()) == [[(str(place), None)]]


def test_lists_of_strange_names(tmp_path):
    """A long name was an OSError."""
    root = kitti(tmp_path, [CAR])
    listing = root / "ImageSets/train.txt"
    listing.write_text("000000\n" + "x" * 200 + "\n../../a\n\u2028\n")
    source = KittiSource(root, "train")
    assert len(source) == 1 and len(source.report.skipped["image missing"]) == 2
    listing.write_text("000000\n" + "x" * 4000)
    with pytest.raises(DataError, match=r"train.txt:2: 'xxx.*too long"):
        KittiSource(root, "train")
    listing.write_bytes(b"000000\n\xff\n")
    with pytest.raises(DataError, match=r"train.txt:2: byte 7 \(0xff\) is not utf-8"):
        KittiSource(root, "train")
    listing.write_text("000000\n", encoding="utf-16")
    assert len(KittiSource(root, "train")) == 1
    listing.unlink()
    listing.mkdir()
    with pytest.raises(DataError, match="a folder, expected a file"):
        KittiSource(root, "train")


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("00", "calib/000000.txt:3: P2 is no camera"),
        ("01", "calib/000000.txt:3: P2 is no camera"),
        ("02", "label_2/000000.txt:1: .*not a number"),
        ("04", "label_2/000000.txt:1: length is"),
        ("05", "label_2/000000.txt:1: 45 fields"),
        ("06", "label_2/000000.txt:1: bottom of the box"),
        ("08", "label_2/000000.txt:3: y of the location"),
        ("09", "label_2/000000.txt:1: truncation"),
        ("10", "label_2/000000.txt:1: y of the location"),
        ("12", "label_2/000000.txt:1: y of the location"),
        ("13", "label_2/000000.txt:1: 45 fields"),
        ("14", "label_2/000000.txt:3: truncation"),
        ("16", "label_2/000000.txt:1: rotation_y"),
        ("17", "label_2/000000.txt:1: 4. fields"),
        ("18", "train.txt:1: .*too long"),
    ],
)
def test_cases_of_the_field(shared, tmp_path, case, said):
    folder = next((shared / "cases/fuzz/e_kitti").glob(f"{case}-*"))
    root = kitti(tmp_path, [CAR])
    places = {"label.txt": "training/label_2/000000.txt", "calib.txt": "training/calib/000000.txt"}
    for name, place in {**places, "train.txt": "ImageSets/train.txt"}.items():
        if (folder / name).exists():
            shutil.copy(folder / name, root / place)
    with pytest.raises(DataError, match=said):
        KittiSource(root, "train")


def test_real_frames(real):
    """Counts of the development set, and 3D boxes of cars that project onto their 2D boxes."""
    train, val = KittiSource(real, "train"), KittiSource(real, "val")
    assert (len(train), len(val)) == (18, 6) and not train.report.skipped
    both = [*(train.labels(i) for i in range(18)), *(val.labels(i) for i in range(6))]
    kinds = [kind for labels in both for kind in labels.kinds]
    assert (kinds.count("Car"), kinds.count("Pedestrian"), kinds.count("DontCare")) == (55, 20, 74)
    assert train.report.objects + val.report.objects == len(kinds) - 74
    assert train.report.regions + val.report.regions == 74
    overlaps = []
    for i in range(18):
        objects, camera = train.objects(i), train.camera(i).astype(np.float64)
        height, width = train.image(i).shape[:2]
        for k in np.flatnonzero(objects.classes == 0):
            high, wide, long_ = objects.dimensions[k]
            cos, sin = np.cos(objects.yaw[k]), np.sin(objects.yaw[k])
            pixels = []
            for a in (-long_ / 2, long_ / 2):
                for b in (-wide / 2, wide / 2):
                    for c in (-high, 0):
                        place = np.array([a * cos + b * sin, c, b * cos - a * sin])
                        u, v, w = camera @ [*(place + objects.locations[k]), 1]
                        pixels.append((u / w, v / w))
            low, top = np.min(pixels, axis=0), np.max(pixels, axis=0)
            hull = np.clip([*low, *top], 0, [width, height, width, height])
            box = objects.boxes[k]
            shared_ = np.maximum(np.minimum(box[2:], hull[2:]) - np.maximum(box[:2], hull[:2]), 0)
            union = np.prod(box[2:] - box[:2]) + np.prod(hull[2:] - hull[:2]) - np.prod(shared_)
            overlaps.append(np.prod(shared_) / union)
    assert np.median(overlaps) > 0.9 and min(overlaps) > 0.7


# --- TensorFlow Datasets ---


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


@pytest.mark.filterwarnings("ignore")
def test_tfds_rows_stay_together(tfds, monkeypatch):
    """A record as TFDS gives it: boxes with the origin at the bottom left, no calibration."""
    with tfds.testing.mock_data(num_examples=1):
        features = tfds.builder("kitti").info.features
    kinds = features["objects"].feature["type"].names
    record = {
        "image": np.zeros((100, 200, 3), np.uint8),
        "image/file_name": b"000007.png",
        "objects": {
            # 10 to 30 pixels above the bottom edge; the second has no area.
            "bbox": np.array([[0.1, 0.5, 0.3, 0.75], [0.1, 0.5, 0.1, 0.75], [0, 0, 1, 1]]),
            "type": np.array([kinds.index(k) for k in ("Cyclist", "Car", "Van")]),
            "alpha": np.array([0.1, 0.2, 0.3], np.float32),
            "dimensions": np.array([[1, 2, 3], [4, 5, 6], [2, 2, 5]], np.float32),
            "location": np.array([[1, 2, 30], [4, 5, 60], [7, 8, 90]], np.float32),
            "occluded": np.array([0, 1, 2]),
            "rotation_y": np.array([1.1, 1.2, 1.3], np.float32),
            "truncated": np.array([0, 0.5, 1], np.float32),
        },
    }
    monkeypatch.setattr(
        "jaxaccum.data.formats.kitti.find_tfds",
        lambda path, split: ("kitti", "train", features, [record]),
    )
    source = open_kitti("tfds:kitti", "train")
    objects, labels = source.objects(0), source.labels(0)
    assert source.names == NAMES and source.name(0) == "000007.png"
    assert [NAMES[c] for c in objects.classes] == ["Cyclist", "Van"]
    np.testing.assert_allclose(objects.boxes, [[100, 70, 150, 90], [0, 0, 200, 100]], rtol=1e-6)
    np.testing.assert_allclose(objects.locations[:, 2], [30, 90])
    np.testing.assert_allclose(objects.dimensions, [[1, 2, 3], [2, 2, 5]])
    np.testing.assert_allclose(objects.yaw, [1.1, 1.3], rtol=1e-6)
    assert labels.kinds == ("Cyclist", "Car", "Van") and labels.occlusion.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(source.camera(0), DEFAULT_CAMERA)
    assert source.report.skipped == {"box without area": [("000007.png", None)]}
    assert "no calibration" in source.report.lines()[-1]
    assert "the 1 images that are not 1242 x 375" in source.report.lines()[-1]
    merged = TfdsKittiSource("tfds:kitti", "train", merge=True)
    assert merged.objects(0).classes.tolist() == [3, 0] and merged.identity != source.identity


@pytest.mark.filterwarnings("ignore")
def test_tfds_rows_without_sense_are_counted(tfds, monkeypatch):
    """A class of -1, TFDS's word for no label, was the last class."""
    with tfds.testing.mock_data(num_examples=1):
        features = tfds.builder("kitti").info.features
    kinds = features["objects"].feature["type"].names
    places = np.array([[1, 2, 30], [1, np.nan, 30], [1, 2, -3], [1, 2, 40]], np.float32)
    record = {
        "image": np.zeros((100, 200, 3), np.uint8),
        "objects": {
            "bbox": np.array([[0.1, 0.5, 0.3, 0.75]] * 3 + [[0.1, 0.2, 0.3, 0.4]]),
            "type": np.array([-1, kinds.index("Van"), kinds.index("Car"), kinds.index("Tram")]),
            "alpha": np.zeros(4, np.float32),
            "dimensions": np.ones((4, 3), np.float32),
            "location": places,
            "occluded": np.zeros(4, int),
            "rotation_y": np.zeros(4, np.float32),
            "truncated": np.zeros(4, np.float32),
        },
    }
    monkeypatch.setattr(
        "jaxaccum.data.formats.kitti.find_tfds",
        lambda path, split: ("kitti", "train", features, [record]),
    )
    source = open_kitti("tfds:kitti", "train")
    assert [NAMES[c] for c in source.objects(0).classes] == ["Tram"]
    assert {k: len(v) for k, v in source.report.skipped.items()} == {
        "unknown type 'class -1'": 1,
        "object with a number that is not finite": 1,
        "object that is not before the camera": 1,
    }
    record["objects"]["bbox"][3, 0] = np.nan
    flat = TfdsSource("kitti", "train", features, [record])
    assert [flat.names[c] for c in flat.objects(0).classes] == ["Van", "Car"]
    assert {k: len(v) for k, v in flat.report.skipped.items()} == {
        "class that has no name": 1,
        "box that is not finite": 1,
    }


@pytest.mark.filterwarnings("ignore")
def test_tfds_mock_and_mistakes(tfds):
    with tfds.testing.mock_data(num_examples=3):
        source = open_kitti("tfds:kitti", "val")
        assert len(source) == 3 and source.report.objects > 0
        for i in range(3):
            objects = source.objects(i)
            assert objects.locations.shape == objects.dimensions.shape == (len(objects), 3)
        with pytest.raises(DataError, match=r"lack .*dimensions, location"):
            open_kitti("tfds:voc/2007", "train")
    with pytest.raises(DataError, match=r"Name a slice instead"):
        open_kitti("tfds:kitti", "train", fraction=0.5)


# --- labels that are not KITTI's ---


@pytest.mark.parametrize("name", ["KITTI", "it's", 'a "b" c', "'\"$HOME `x`", "é ü", "a\nb\\c"])
def test_the_command_that_is_advised_can_be_run(tmp_path, name):
    """It imported a module that was not there, and a quote in the path broke it."""
    root = kitti(tmp_path / name, [CAR] * 5, split="all")
    with pytest.raises(DataError) as caught:
        KittiSource(root, "train")
    _, _, command = str(caught.value).partition("make a random train and val list: ")
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    exec(code, {})
    assert (len(KittiSource(root, "train")), len(KittiSource(root, "val"))) == (4, 1)


def test_boxes_as_parts_of_an_image_are_refused(tmp_path):
    """They were boxes in the first pixel."""
    text = "\n".join(row(box=f"0.{i} 0.2 0.{i}5 0.9") for i in range(4))
    with pytest.raises(DataError, match=r"\(train\): all of its 8 boxes lie between 0 and 1"):
        KittiSource(kitti(tmp_path / "parts", [text, text]), "train")
    few = KittiSource(kitti(tmp_path / "few", [text]), "train")
    assert few.report.objects == 4
    mixed = KittiSource(kitti(tmp_path / "mixed", [text, text, CAR]), "train")
    assert mixed.report.objects == 9
    none = row(box="0 0 0 0")
    nowhere = KittiSource(kitti(tmp_path / "none", [f"{none}\n" * 9]), "train")
    assert nowhere.report.skipped.keys() == {"box without area", "duplicate label"}


def test_scores_in_labels_are_said(tmp_path):
    labels = [f"{CAR} 0.5", f"{CAR} 0.9\n{row(box='1 2 3 4')} 1", CAR]
    source = KittiSource(kitti(tmp_path, labels), "train")
    assert source.report.objects == 4
    assert source.report.lines()[-1] == (
        "  2 label files have 16 columns, with scores, as files of detections have: they are taken "
        "for the truth, and the scores are not used"
    )
    plain = KittiSource(kitti(tmp_path / "plain", [CAR]), "train")
    assert not plain.report.notes


def test_types_in_other_cases_say_which_they_are_like(tmp_path):
    text = "\n".join(row(kind) for kind in ("car", "PERSON_SITTING", "Ox", "Car", "dontcare"))
    root = kitti(tmp_path, [text])
    file = str(root / "training" / "label_2" / "000000.txt")
    plain, merged = KittiSource(root, "train"), KittiSource(root, "train", merge=True)
    assert plain.report.skipped == {
        "unknown type 'car', did you mean Car?": [(file, 1)],
        "unknown type 'PERSON_SITTING', did you mean Person_sitting?": [(file, 2)],
        "unknown type 'Ox'": [(file, 3)],
        "unknown type 'dontcare', did you mean DontCare?": [(file, 5)],
    }
    assert merged.report.objects == 5 and merged.report.skipped == {
        "type taken for Misc: 'car', did you mean Car?": [(file, 1)],
        "type taken for Misc: 'PERSON_SITTING', did you mean Person_sitting?": [(file, 2)],
        "type taken for Misc: 'dontcare', did you mean DontCare?": [(file, 5)],
    }


@pytest.mark.parametrize("merge", [False, True])
def test_a_split_without_a_type_of_kittis_is_refused(tmp_path, merge):
    """The evaluation then spoke of the level moderate."""
    root = kitti(tmp_path, [f"{row('car')}\n{REGION}\n{row('Ox')}", row("car")])
    with pytest.raises(DataError) as caught:
        KittiSource(root, "train", merge=merge)
    assert "(train): none of its objects has a type of KITTI's" in str(caught.value)
    assert "2 x 'car', did you mean Car?; 1 x 'Ox'. Rename" in str(caught.value)
    others = kitti(tmp_path / "others", [row("Ox")])
    if merge:
        assert KittiSource(others, "train", merge=True).objects(0).classes.tolist() == [4]
    else:
        with pytest.raises(DataError, match="1 x 'Ox'"):
            KittiSource(others, "train")
    empty = kitti(tmp_path / "empty", [REGION, ""])
    assert len(KittiSource(empty, "train", merge=merge)) == 2
