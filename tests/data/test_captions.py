"""Captions of clouds: files of them, what fills gaps, their vectors on disk and in batches."""

import itertools
import pickle
import random
import re

import numpy as np
import pytest

from jaxaccum.data import CloudStream, DataError, Shapes, cloud_batches, open_clouds
from jaxaccum.data.captions import Captions, Texts, cached_vectors, read_captions
from jaxaccum.data.clouds import CloudReport
from jaxaccum.data.synthetic.shapes import SEEN, UNSEEN
from jaxaccum.models.text import HashedText

CHAIR, TABLE = "03001627", "04379243"
MODELS = [f"{CHAIR}-u1-two-2", f"{CHAIR}-b", f"{TABLE}-c.d", f"{TABLE}-e"]


def shapenet(root):
    (root / "shapenet_pc").mkdir(parents=True)
    (root / "ShapeNet-55").mkdir()
    for seed, model in enumerate(MODELS):
        points = np.random.default_rng(seed).standard_normal((64, 3)).astype(np.float32)
        np.save(root / "shapenet_pc" / f"{model}.npy", points)
    for split in ("train", "test"):
        rows = "".join(f"{model}.npy\n" for model in MODELS)
        (root / "ShapeNet-55" / f"{split}.txt").write_text(rows)
    return f"{root}:ShapeNet-55"


def written(folder, content):
    file = folder / "captions.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


class Memory:
    """Random clouds in memory, two samples of each name."""

    names = ("cup", "hat")
    identity = "0" * 12
    points = 40

    def __init__(self, length=6):
        self.length, self.report = length, CloudReport("memory")

    def __len__(self):
        return self.length

    def category(self, index):
        return index % 2

    def name(self, index):
        return f"{self.names[index % 2]}/{index % 4}"

    def sample(self, index, rng):
        complete = np.random.default_rng(index).standard_normal((40, 3)).astype(np.float32)
        return np.resize(complete, (2048, 3)), complete


class Counting:
    """An encoder that remembers what it was asked: the length and the first letters."""

    name, identity = "counting", "c" * 12

    def __init__(self, width=4):
        self.width, self.asked = width, []

    def describe(self):
        return "text encoder counting"

    def encode(self, captions):
        self.asked.append(list(captions))
        rows = [[len(c), *map(ord, f"{c:<9}"[: self.width - 1])] for c in captions]
        return np.array(rows, np.float32)


# --- files ---


def test_a_file_of_captions(tmp_path):
    file = written(
        tmp_path,
        "\ufeffid,caption,score,note\r\n"
        f'{CHAIR}_b,"A ""big"" chair, with\n  four legs",0.5,more\r\n'
        "\r\n"
        f"{TABLE}_c.d,first\r\n"
        f" {TABLE}_c.d , last é \r\n"
        f"{TABLE}_e,\r\n",
    )
    report = CloudReport("x")
    assert read_captions(file, report) == {
        "id": "caption",
        f"{CHAIR}_b": 'A "big" chair, with four legs',
        f"{TABLE}_c.d": "last é",
        f"{TABLE}_e": "",
    }
    assert report.skipped == {"caption that a later row replaces": [(str(file), 6)]}


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"a,b\nc,\xff\n", 2, r"not utf-8 \(.*\)\. Save the file as UTF-8"),
        ('a,"b\nb"\nonly\n', 3, "one column, 'only', expected KEY,CAPTION"),
        ('a,b\nc,"never ends\nd,e\n', 2, "not a row of CSV"),
        ('a,"b" c\n', 1, "Quotes inside a caption are doubled"),
    ],
)
def test_mistakes_in_files_name_the_line(tmp_path, content, line, said):
    file = written(tmp_path, content)
    with pytest.raises(DataError, match=said) as raised:
        read_captions(file)
    assert raised.value.file == str(file) and raised.value.line == line
    assert str(raised.value).startswith(f"{file}:{line}: ")
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_captions(tmp_path / "none.csv")


# --- captions of sources ---


def test_captions_are_of_the_file_and_of_the_category_where_it_has_none(tmp_path):
    source = open_clouds(shapenet(tmp_path), "train")
    file = written(
        tmp_path, f"{CHAIR}_u1-two-2,a low chair\n{TABLE}_e,\nother,of nobody\n{TABLE}_c.d,ways\n"
    )
    captions = Captions.of(source, file)
    assert [captions[i] for i in range(len(captions))] == [
        "a low chair", "a 3D object from category chair", "ways", "a 3D object from category table"
    ]  # fmt: skip
    assert captions.ids.dtype == np.int32 and captions.ids.tolist() == [0, 1, 2, 3]
    assert captions.report.lines() == [
        f"captions of {source.report.where}: 4 captions for 4 samples: 2 from the file, "
        "1 by category, no row, 1 by category, the file's is empty"
    ]
    plain = Captions.of(source)
    assert plain.texts == ("a 3D object from category chair", "a 3D object from category table")
    assert plain.ids.tolist() == [0, 0, 1, 1]
    assert plain.report.origins == {"by category": 4}


def test_the_published_rule_has_digits_and_names_up_to_a_hyphen_or_dot(tmp_path):
    source = open_clouds(shapenet(tmp_path), "train")
    file = written(tmp_path, f"{CHAIR}_u1,a low chair\n{TABLE}_c,ways\n")
    captions = Captions.of(source, file, published=True)
    assert captions.texts == (
        "a low chair", f"a 3D object from category {CHAIR}", "ways",
        f"a 3D object from category {TABLE}",
    )  # fmt: skip


def test_views_of_a_shape_share_its_caption(tmp_path):
    source = open_clouds(shapenet(tmp_path), "test")
    captions = Captions.of(source, written(tmp_path, f"{CHAIR}_b,a low chair\n"))
    assert len(captions) == 32
    assert captions.ids.tolist() == [0] * 8 + [1] * 8 + [2] * 16
    assert captions.texts[1] == "a low chair"


def test_a_file_of_other_shapes_is_refused(tmp_path):
    source = open_clouds(shapenet(tmp_path), "train")
    file = written(tmp_path, "id,caption\nchair-b,a chair\n")
    said = rf"no caption for any shape.*as in '{CHAIR}_u1-two-2'; there is 'id', 'chair-b'\."
    with pytest.raises(DataError, match=said):
        Captions.of(source, file)


# --- embedded shapes ---


def test_embedded_shapes_are_described_and_told_apart():
    source = open_clouds("", "val", viewpoints=2)
    captions = Captions.of(source)
    assert len(captions) == 400 and captions.report.origins == {"by the data set": 400}
    assert (captions.ids[::2] == captions.ids[1::2]).all()
    assert len(captions.texts) > 100
    said = np.array([Shapes("val").caption(index) for index in range(60)])
    assert [captions[2 * index] for index in range(60)] == said.tolist()
    ids = captions.ids[:120:2]
    np.testing.assert_array_equal(ids[:, None] == ids, said[:, None] == said)


def test_a_file_can_caption_embedded_shapes(tmp_path):
    source = open_clouds("", "unseen")
    captions = Captions.of(source, written(tmp_path, "mug_unseen_00001,my mug\n"))
    assert captions[1] == "my mug" and captions[5] == Shapes("unseen").caption(5)
    assert captions.report.origins == {"by the data set, no row": 79, "from the file": 1}


@pytest.mark.parametrize(("category", "few", "many", "axes"), [
    ("bookshelf", "wide", "tall", (1, 0)), ("table", "short", "long", (0, 2)),
    ("mug", "squat", "tall", (1, 0)),
])  # fmt: skip
def test_captions_tell_the_proportions_of_the_cloud(category, few, many, axes):
    shapes = Shapes("unseen" if category in UNSEEN else "train")
    found = {few: [], many: [], "": []}
    first = shapes.names.index(category)
    for index in itertools.islice(range(first, len(shapes), len(shapes.names)), 16):
        words = shapes.caption(index).split(" with ")[0].split()
        size = np.ptp(shapes.complete(index), axis=0)
        found[next((w for w in (few, many) if w in words), "")].append(
            size[axes[0]] / size[axes[1]]
        )
    assert found[few] and found[many]
    middle = found[""] or [1.0]
    # The cloud is within two percent of the surface's extent.
    assert max(found[few]) < 1.02 * min(*middle, *found[many])
    assert min(found[many]) > 0.98 * max(*middle, *found[few])


@pytest.mark.parametrize("name", [*SEEN, *UNSEEN])
def test_telling_changes_no_shape_and_reads_as_a_sentence(name):
    maker = (SEEN | UNSEEN)[name]
    heard = set()
    for seed in range(25):
        said = []
        told = np.concatenate(maker(random.Random(seed), said.append))
        np.testing.assert_array_equal(told, np.concatenate(maker(random.Random(seed))))
        heard.add(tuple(said))
        assert all(phrase == phrase.strip() and "  " not in phrase for phrase in said)
    assert len(heard) > 4


def test_captions_count_what_is_there():
    def rockets(seed):
        said = []
        parts = UNSEEN["rocket"](random.Random(seed), said.append)
        return " ".join(said), len(parts)

    for seed in range(30):
        said, parts = rockets(seed)
        fins = 3 if "three" in said else 4
        assert parts == 1 + fins + 2 * ("boosters" in said)


# --- vectors on disk ---


def test_only_what_is_missing_is_encoded(tmp_path):
    encoder, notes = Counting(), []
    first = cached_vectors(encoder, ["one", "three", "one"], tmp_path / "a", notes.append)
    np.testing.assert_array_equal(first, encoder.encode(["one", "three", "one"]))
    encoder.asked.clear()
    again = cached_vectors(encoder, ["four", "three", "one"], tmp_path / "a", notes.append)
    assert encoder.asked == [["four"]]
    np.testing.assert_array_equal(again, encoder.encode(["four", "three", "one"]))
    file = tmp_path / "a" / "text-cccccccccccc.npz"
    assert notes == [
        f"2 captions encoded, 0 found in {file}", f"1 captions encoded, 2 found in {file}"
    ]  # fmt: skip
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == [file.name]
    encoder.asked.clear()
    other = Counting()
    other.identity = "d" * 12
    cached_vectors(other, ["one"], tmp_path / "a")
    assert other.asked == [["one"]]
    for _ in range(2):
        cached_vectors(encoder, ["one"], None)
    assert encoder.asked == [["one"], ["one"]]
    assert cached_vectors(encoder, [], tmp_path / "b").shape == (0, 4)


def damages():
    def save(**arrays):
        return lambda file: np.savez(file, **arrays)

    keys, vectors = np.zeros((1, 16), np.uint8), np.zeros((1, 4), np.float32)
    right = "jaxaccum text vectors 1"
    return {
        "empty": lambda file: file.write_bytes(b""),
        "cut": lambda file: file.write_bytes(file.read_bytes()[:-60]),
        "flipped": lambda file: file.write_bytes(flipped(file.read_bytes())),
        "text": lambda file: file.write_bytes(b"hello"),
        "an array": lambda file: np.save(file.open("wb"), vectors),
        "other arrays": save(a=keys),
        "other format": save(format="2", keys=keys, vectors=vectors),
        "other width": save(format=right, keys=keys, vectors=vectors[:, :3]),
        "not finite": save(format=right, keys=keys, vectors=vectors * np.nan),
    }


def flipped(data):
    at = data.index(np.float32(ord("t")).tobytes())  # in a vector, where no number looks wrong
    return data[:at] + b"\x01" + data[at + 1 :]


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_file_is_made_anew_and_said(tmp_path, damage):
    encoder, notes = Counting(), []
    cached_vectors(encoder, ["one", "three"], tmp_path)
    (file,) = tmp_path.iterdir()
    damages()[damage](file)
    encoder.asked.clear()
    vectors = cached_vectors(encoder, ["three"], tmp_path, notes.append)
    assert encoder.asked == [["three"]] and len(notes) == 2
    assert notes[0].startswith(f"{file} ") and "is made anew" in notes[0]
    np.testing.assert_array_equal(vectors, encoder.encode(["three"]))
    encoder.asked.clear()
    cached_vectors(encoder, ["three"], tmp_path)
    assert encoder.asked == []


def test_an_encoder_that_breaks_its_word_is_stopped(tmp_path):
    encoder = Counting()
    encoder.encode = lambda captions: np.zeros((len(captions), 3))
    with pytest.raises(ValueError, match=r"counting: .*shape \(2, 3\).*expected \(2, 4\)"):
        cached_vectors(encoder, ["a", "b"], tmp_path)
    encoder.encode = lambda captions: np.full((len(captions), 4), np.inf)
    with pytest.raises(ValueError, match="all finite"):
        cached_vectors(encoder, ["a", "b"], tmp_path)
    assert not list(tmp_path.iterdir())


# --- in batches ---


@pytest.fixture(scope="module")
def texts():
    return Texts.of(Memory(), None, HashedText(16), None)


def test_texts_are_captions_and_their_vectors(texts, tmp_path):
    assert len(texts) == 6 and texts.width == 16
    assert texts.captions.ids.tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(texts.vectors, HashedText(16).encode(texts.captions.texts))
    assert texts.report == (
        "captions of memory: 2 captions for 6 samples: 6 by category",
        "  text encoder hashed-16: hashed words, width 16; no language model",
        "  2 captions encoded",
    )
    same = Texts.of(Memory(), None, HashedText(16), tmp_path)
    assert same.identity == texts.identity
    file = written(tmp_path, "cup_0,mine\n")
    others = [
        Texts.of(Memory(), None, HashedText(8), None),
        Texts.of(Memory(4), None, HashedText(16), None),
        Texts.of(Memory(), file, HashedText(16), None),
    ]
    assert len({texts.identity, *(other.identity for other in others)}) == 4
    assert others[2].captions.ids.tolist() == [0, 1, 2, 1, 0, 1]


@pytest.mark.parametrize("backend", ["threads", "grain"])
def test_samples_carry_their_captions_and_are_else_the_same(texts, backend):
    if backend == "grain":
        pytest.importorskip("grain")
    stream = CloudStream(Memory(), seed=3, mirror=True, texts=texts)
    plain = CloudStream(Memory(), seed=3, mirror=True)
    sample = stream.sample(0)
    assert sample["text"].shape == (16,) and sample["text"].dtype == np.float32
    assert sample["caption"].shape == () and sample["caption"].dtype == np.int32
    for told, silent in zip(
        stream.windows(0, [4, 5], backend=backend), plain.windows(0, [4, 5]), strict=True
    ):
        assert told.keys() - silent.keys() == {"text", "caption"}
        for key, value in silent.items():
            np.testing.assert_array_equal(told[key], value)
        np.testing.assert_array_equal(told["caption"], told["index"] % 2)
        np.testing.assert_array_equal(told["text"], texts.vectors[told["index"] % 2])
    again = pickle.loads(pickle.dumps(stream)).sample(0)
    np.testing.assert_array_equal(again["text"], sample["text"])


def test_evaluation_carries_captions_and_fills_up_with_none(texts):
    batches = list(cloud_batches(Memory(), batch=4, texts=texts))
    assert [batch["caption"].tolist() for batch in batches] == [[0, 1, 0, 1], [0, 1, -1, -1]]
    np.testing.assert_array_equal(batches[1]["text"][:2], texts.vectors)
    assert not batches[1]["text"][2:].any()
    assert "text" not in next(iter(cloud_batches(Memory(), batch=4)))


def test_captions_of_another_source_are_refused(texts):
    said = "captions of 6 samples for memory, which has 5"
    with pytest.raises(ValueError, match=said):
        CloudStream(Memory(5), seed=0, texts=texts)
    with pytest.raises(ValueError, match=said):
        cloud_batches(Memory(5), batch=2, texts=texts)


# --- captions with commas ---


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("a,x\nid,a plane, with wings\nb,y\n", 2, "3 columns, but line 1 has 2: the caption would "
         "be 'a plane', without 'with wings'. Put a caption with commas in quotes"),
        ("id,a plane, with wings, and more\nb,y\n", 1, "without 'with wings,and more'"),
        ("id,caption\nb,y\nc,a plane, red\n", 3, "'a plane', without 'red'"),
        ("id,Caption,score\nb,y,1\nc,a plane, red,1\n", 3, "4 columns, but line 1 has 3"),
        ('id, "big" chair\n', 1, "Quotes inside a caption are doubled"),
    ],
)  # fmt: skip
def test_commas_without_quotes_are_refused(tmp_path, content, line, said):
    """What came after the comma was left out without a word."""
    file = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_captions(file)
    assert str(caught.value).startswith(f"{file}:{line}: ") and said in str(caught.value)


def test_quotes_after_a_blank(tmp_path):
    file = written(tmp_path, 'id, "a, b"\nother,   "c ""d"""\nthird, e \n')
    assert read_captions(file) == {"id": "a, b", "other": 'c "d"', "third": "e"}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("a,b,1,2\nc,d,3,4\n", "has 4 columns, of which the first two are read, not '1,2' of li"),
        ("id,caption,score\na,b,0.5\nc,d\n", "has 3 columns, .* not 'score' of line 1"),
        ("a,b\nc,d,, \n", None),
    ],
)  # fmt: skip
def test_further_columns_of_all_rows_are_said(tmp_path, content, note):
    report = CloudReport("x")
    found = read_captions(written(tmp_path, content), report)
    assert {"a": "b", "c": "d"}.items() <= found.items()
    assert len(report.notes) == (note is not None) and not report.skipped
    if note:
        assert re.search(note, report.notes[0])
