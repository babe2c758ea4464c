"""Text files that a user gives: encodings, what is no text, numbers, lines, YAML and JSON."""

from __future__ import annotations

import json
import os
import time

import pytest

from jaxaccum.data import texts
from jaxaccum.data.base import DataError

TEXT = "größe: 1\nné: 2\n"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "given.txt"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read(file, encoding):
    file.write_bytes(TEXT.encode(encoding))
    assert texts.read_text(file) == TEXT


@pytest.mark.parametrize(("order", "mark"), [("le", b"\xff\xfe"), ("be", b"\xfe\xff")])
def test_both_orders_of_utf_16(file, order, mark):
    file.write_bytes(mark + TEXT.encode(f"utf-16-{order}"))
    assert texts.read_text(file) == TEXT


def test_the_encoding_of_the_system_is_read_and_said(file, monkeypatch, capsys):
    monkeypatch.setattr(texts.locale, "getencoding", lambda: "cp1252")
    monkeypatch.setattr(texts, "_said", set())
    file.write_bytes(TEXT.encode("cp1252"))
    assert texts.read_text(file) == TEXT
    assert texts.read_text(file) == TEXT
    said = capsys.readouterr().err
    assert said.count("cp1252") == 1
    assert str(file) in said


@pytest.mark.parametrize("system", ["UTF-8", "ANSI_X3.4-1968", "utf8"])
def test_other_encodings_are_refused_with_their_place(file, monkeypatch, system):
    monkeypatch.setattr(texts.locale, "getencoding", lambda: system)
    file.write_bytes(b"a: 1\nb: " + "\u4e2d".encode("gbk"))
    with pytest.raises(DataError, match=r"given.txt:2: byte 8 \(0xd6\) is not utf-8") as caught:
        texts.read_text(file)
    assert (caught.value.file, caught.value.line) == (str(file), 2)


def test_the_line_of_a_byte_that_begins_it(file, monkeypatch):
    monkeypatch.setattr(texts.locale, "getencoding", lambda: "UTF-8")
    for content, line in ((b"\xd6", 1), (b"a\n\xd6", 2), (b"a\r\n\r\n\xd6", 3)):
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"given.txt:{line}: byte"):
            texts.read_text(file)


def test_utf_16_without_its_mark_is_refused(file):
    file.write_bytes("abc".encode("utf-16-le"))
    with pytest.raises(DataError, match="NUL at character 1"):
        texts.read_text(file)


def test_what_is_no_file(tmp_path):
    with pytest.raises(texts.MissingFileError):
        texts.read_text(tmp_path / "absent")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DataError, match="a link to nowhere") as caught:
        texts.read_text(tmp_path / "link")
    assert not isinstance(caught.value, texts.MissingFileError)
    (tmp_path / "ring").symlink_to("ring")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for name, said in {
        "": "a folder", "pipe": "a pipe", "ring": "symbolic links", "file/below": "Not a directory",
        "a\0b": "null", "n" * 300: "too long",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=said):
            texts.read_text(tmp_path / name)
    with pytest.raises(DataError, match="5 bytes, expected at most 4"):
        (tmp_path / "long").write_text("12345")
        texts.read_text(tmp_path / "long", limit=4)


def test_lines_as_editors_count_them():
    assert texts.lines("a\u2028b\x0bc\r\nd\re\n\nf") == ["a\u2028b\x0bc", "d", "e", "", "f"]
    assert texts.lines("") == []
    assert texts.lines("a\n") == ["a"]


@pytest.mark.parametrize("word", ["0", "-1.5", "+.5", "1.", "1e-3", "nan", "-inf", "Infinity"])
def test_numbers(word):
    assert texts.number(word) == pytest.approx(float(word), nan_ok=True)


@pytest.mark.parametrize("word", ["0_1", "\uff11", "\u0661", "0x1", "", ".", "e5", "1,5", " 1"])
def test_no_numbers(word):
    with pytest.raises(ValueError, match="is not a number"):
        texts.number(word)
    with pytest.raises(ValueError, match="is not a whole number"):
        texts.whole_number(word)


def test_long_words_are_refused_at_once():
    start = time.process_time()
    with pytest.raises(ValueError, match="is not a number"):
        texts.number("2" * 10**6 + "x")
    assert time.process_time() - start < 2


def test_whole_numbers():
    assert texts.whole_number("-012") == -12
    with pytest.raises(ValueError, match="whole"):
        texts.whole_number("1" * 19)


def test_what_is_shown_is_short_and_printable():
    assert len(texts.shown("x" * 10**7)) == 80
    assert len(texts.shown(list(range(1000)))) == 80
    assert texts.shown(10**5000) == "a number of over 80 digits"
    assert texts.shown_path(b"a\xff\n.txt".decode("utf-8", "surrogateescape")) == r"a\xff\n.txt"
    assert texts.shown_path("\ud800") == r"\ud800"


def test_yaml_keeps_what_is_written(file):
    file.write_text("names: [no, 007, 2024-02-31, 1_0, 0x1, ~, null, '', yes, 1:30]\nnc: 10\n")
    assert texts.read_yaml(file) == {
        "names": ["no", "007", "2024-02-31", "1_0", "0x1", None, None, "", "yes", "1:30"],
        "nc": "10",
    }
    file.write_text("a: &x {b: c}\nd:\n  <<: *x\n  e: f\n")
    assert texts.read_yaml(file) == {"a": {"b": "c"}, "d": {"b": "c", "e": "f"}}


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!int x", "not valid YAML"), ("a: !!timestamp x", "not valid YAML"),
        ("a: !!float x", "not valid YAML"), ("a: !!bool x", "not valid YAML"),
        ("a: !!binary \u20ac", "not valid YAML"), ("a: !!python/object:os.system x", "constructor"),
        ("a: b\nc: [", r"given.txt:2: not valid YAML"), ("[" * 5000, "nested too deeply"),
        ("&a [*a]", "contains itself"), (BOMB, "once its aliases are followed"),
        ("{[a]: b}: c", "unhashable"), ("a: \x01", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_that_cannot_be(file, text, said):
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        texts.read_yaml(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n"b": c}', r"given.txt:2: not valid JSON"), ("[" * 10**5, "nested too deeply"),
        ("1" * 5000, "not valid JSON"), ("", r"given.txt:1: not valid JSON"),
    ],
)  # fmt: skip
def test_json_that_cannot_be(file, text, said):
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        texts.read_json(file)


def test_json_in_other_encodings(file):
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_bytes('{"ä": 1}'.encode(encoding))
        assert texts.read_json(file) == {"ä": 1}


def test_what_is_no_file_is_told_once(tmp_path):
    """The refusal was caught as a NUL in the path, and told inside another one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("12345")
    for name, said in {
        "": "a folder, expected a file. Check the path.",
        "pipe": "a pipe or a device, expected a file. Check the path.",
        "long": "5 bytes, expected at most 4. Check that this is the right file.",
    }.items():
        with pytest.raises(DataError) as caught:
            texts.read_text(tmp_path / name, limit=4)
        assert str(caught.value) == f"{tmp_path / name}: {said}"
    with pytest.raises(DataError, match=r"a\\x00b: no path \(.*null.*\)\. Check the path\."):
        texts.read_text(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ('{"images": [1],\n"annotations": [],\n"images": [2]}', 3, "'images'", 1),
        ('[{"bbox": 1},\r\n{"id": {"bbox": 2}, "bbox": [1],\r"bbox": [1]}]', 3, "'bbox'", 2),
        ('{"a": "x\\": {", "\\u0062": 1, "c": {"a": 1}, "b": 2}', 1, "'b'", 1),
        ('{"": {}, "": {}}', 1, "''", 1),
        ('{"\\ud800": 1, "\\ud800": 2}', 1, r"'\\ud800'", 1),
    ],
)  # fmt: skip
def test_json_with_a_key_twice(file, text, line, key, first):
    """Python keeps the last, and what the other held was gone."""
    file.write_bytes(text.encode())
    with pytest.raises(DataError) as caught:
        texts.read_json(file)
    told = f"{file}:{line}: not valid JSON: the key {key} is in line {first} already, "
    assert str(caught.value).startswith(told.replace("\\\\", "\\"))
    assert (caught.value.file, caught.value.line) == (str(file), line)


def test_json_with_equal_keys_in_different_objects(file):
    content = {"a": [{"a": 1, "b": "a"}, {"a": {"a": 2}}], "b": "a"}
    file.write_text(json.dumps(content))
    assert texts.read_json(file) == content


def test_typed_yaml(file):
    file.write_text("a: 1\nb: [0.5, true, null, x]\n3: y\n")
    assert texts.read_yaml(file, typed=True) == {"a": 1, "b": [0.5, True, None, "x"], 3: "y"}
    file.write_text("a: 1\nb: 2\na: 3\n")
    for typed in (True, False):
        with pytest.raises(DataError, match=r"given.txt:3: .* 'a' is in line 1 already"):
            texts.read_yaml(file, typed=typed)
