"""Captions become vectors: hashed words, and the text half of CLIP against transformers."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxaccum.models.text import ClipText, HashedText, encoder
from jaxaccum.weights.transfer import WeightsError

# --- hashed words ---


# Where "a slender lamp" counts, and what: a filler, two words, a pair, and pieces.
LAMP = {
    11: 0.25, 107: -0.25, 125: 0.25, 156: -0.25, 173: 0.25, 177: -1, 194: 0.0625,
    218: -0.25, 226: 0.25, 251: -0.25, 255: 0.25, 265: 1, 289: 0.5, 382: -0.25, 396: -0.25,
    423: 0.25, 432: -0.25, 441: -0.25, 444: 0.25, 475: 0.25, 496: 0.25, 503: 0.25,
}  # fmt: skip


def cosine(first, second):
    a, b = HashedText().encode([first, second])
    return float(a @ b)


def test_hashed_vectors_are_the_same_everywhere():
    vector = HashedText().encode(["A slender lamp"])[0]
    assert np.flatnonzero(vector).tolist() == list(LAMP)
    counts = np.array(list(LAMP.values()))
    expected = (counts / np.sqrt((counts**2).sum())).astype(np.float32)
    np.testing.assert_array_equal(vector[list(LAMP)], expected)
    assert HashedText().identity == encoder("hashed").identity == "f3335ee4ca72"


def test_hashed_vectors_are_of_length_one_each_by_itself():
    captions = ["a chair", "", "two tall red chairs, with arms", "...!", "椅子 ñandú"]
    vectors = HashedText().encode(captions)
    assert vectors.shape == (5, 512) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1, 0, 1], rtol=1e-6)
    for caption, vector in zip(captions, vectors, strict=True):
        np.testing.assert_array_equal(HashedText().encode([caption])[0], vector)
    assert HashedText().encode([]).shape == (0, 512)


def test_hashed_vectors_know_words_pieces_and_neighbours_but_not_case_or_commas():
    assert cosine("A Chair, with arms!", "a chair with arms") == pytest.approx(1, abs=1e-6)
    same = cosine("a chair with a barred back", "a wide chair with armrests")
    assert same > cosine("a chair with a barred back", "a mug with a small handle") + 0.2
    assert cosine("chairs", "chair") > 0.15 > abs(cosine("chairs", "mug"))
    # Words in another order are another caption, but a near one.
    assert 0.5 < cosine("low back high arms", "high back low arms") < 0.99
    # Fillers hardly count.
    assert cosine("a lamp with the cord", "lamp cord") > 0.98


def test_hashed_vectors_of_another_width():
    narrow = encoder("hashed-64")
    assert narrow.width == 64 and narrow.encode(["a"]).shape == (1, 64)
    assert narrow.identity != encoder("hashed").identity
    assert "hashed-64" in narrow.describe() and "no language model" in narrow.describe()


@pytest.mark.parametrize("name", ["", "bert", "clip", "clip:", "hashed:x", "hashed-0", "hashed-x"])
def test_unknown_encoders_name_the_choices(name):
    with pytest.raises(ValueError, match=r"expected 'hashed', 'hashed-WIDTH', 'clip:FOLDER'"):
        encoder(name)


# --- CLIP ---

VOCAB, LENGTH, WIDTH, LAYERS = 40, 7, 8, 2
TEXT = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 12,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "max_position_embeddings": LENGTH,
    "projection_dim": 6, "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1,
}  # fmt: skip
IDS = np.array([[38, 3, 17, 39, 39, 39, 39], [38, 5, 6, 7, 8, 9, 39], [38, 39, 39, 39, 39, 39, 39]])
ENDS = np.array([3, 6, 1])
# Of transformers 5.23 with torch 2.13: CLIPTextModel's pooler_output and
# CLIPTextModelWithProjection's text_embeds of IDS with the weights of `tensors`.
GOLDEN = {
    ("quick_gelu", "clip"): [
        [-0.071729, -0.486429, -0.040306, 2.283732, 0.256542, -0.007415, 1.029626, 1.054299],
        [0.108223, -0.540406, 0.166341, 2.177941, 0.364516, -0.049396, 1.086800, 1.093221],
        [0.124287, -0.504769, 0.147821, 2.211347, 0.304874, 0.028374, 1.051672, 1.163317],
    ],
    ("quick_gelu", "clip-projected"): [
        [-0.712854, -3.768465, -3.143824, 0.551051, 3.707774, 3.243514],
        [-0.761695, -3.844469, -3.172765, 0.597436, 3.784186, 3.275330],
        [-0.787971, -3.840878, -3.142813, 0.624497, 3.781929, 3.245959],
    ],
    ("gelu", "clip"): [
        [-0.070703, -0.486194, -0.039355, 2.283495, 0.256754, -0.007385, 1.029640, 1.054867],
        [0.109163, -0.540059, 0.167165, 2.177725, 0.364494, -0.049253, 1.086664, 1.094003],
        [0.125138, -0.504540, 0.148587, 2.211089, 0.304940, 0.028382, 1.051610, 1.163866],
    ],
    ("gelu", "clip-projected"): [
        [-0.713434, -3.768846, -3.143633, 0.551627, 3.708172, 3.243346],
        [-0.762319, -3.844815, -3.172495, 0.598058, 3.784553, 3.275083],
        [-0.788482, -3.841183, -3.142616, 0.625005, 3.782251, 3.245781],
    ],
}


def tensors():
    shapes = {
        "embeddings.token_embedding.weight": (VOCAB, WIDTH),
        "embeddings.position_embedding.weight": (LENGTH, WIDTH),
        "final_layer_norm.weight": (WIDTH,),
        "final_layer_norm.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        of = {f"layer_norm{k}.{kind}": (WIDTH,) for k in (1, 2) for kind in ("weight", "bias")}
        of |= {f"self_attn.{n}_proj.weight": (WIDTH, WIDTH) for n in ("q", "k", "v", "out")}
        of |= {f"self_attn.{n}_proj.bias": (WIDTH,) for n in ("q", "k", "v", "out")}
        of |= {"mlp.fc1.weight": (12, WIDTH), "mlp.fc1.bias": (12,)}
        of |= {"mlp.fc2.weight": (WIDTH, 12), "mlp.fc2.bias": (WIDTH,)}
        shapes |= {f"encoder.layers.{layer}.{key}": shape for key, shape in of.items()}
    shapes = {f"text_model.{key}": shape for key, shape in shapes.items()}
    shapes["text_projection.weight"] = (6, WIDTH)
    return {
        key: np.sin(np.arange(np.prod(shape)) * 1.7 + number).astype(np.float32).reshape(shape)
        for number, (key, shape) in enumerate(shapes.items())
    }


def clip(folder, activation="quick_gelu", tokenizer="{}"):
    folder.mkdir(parents=True)
    config = {"model_type": "clip", "text_config": TEXT | {"hidden_act": activation}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer)
    more = {
        "vision_model.class_embedding": np.zeros(3, np.float32),
        "text_model.embeddings.position_ids": np.arange(LENGTH)[None],
    }
    save_file(tensors() | more, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("activation", "kind"), GOLDEN)
def test_clip_is_transformers(tmp_path, activation, kind):
    model = encoder(f"{kind}:{clip(tmp_path / 'm', activation)}")
    assert model.width == (8 if kind == "clip" else 6)
    vectors = model.encode_tokens(IDS, ENDS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, GOLDEN[activation, kind], atol=3e-6)


def test_clip_looks_back_only_and_each_caption_is_its_own(tmp_path):
    model = ClipText(clip(tmp_path / "m"))
    ids, ends = np.tile(IDS, (12, 1)), np.tile(ENDS, 12)  # more than fit in one batch
    ids[3:, 4:] = np.where(ends[3:, None] == 3, 11, ids[3:, 4:])  # behind the end
    vectors = model.encode_tokens(ids, ends)
    assert vectors.shape == (36, 8)
    np.testing.assert_allclose(vectors, np.tile(vectors[:3], (12, 1)), atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.05
    assert model.encode_tokens(IDS[:0], ENDS[:0]).shape == (0, 8)


def test_clip_in_parts_and_in_half_precision(tmp_path):
    whole = ClipText(clip(tmp_path / "whole"))
    folder = clip(tmp_path / "parts")
    (folder / "model.safetensors").unlink()
    weights, of = tensors(), {}
    for part, keys in enumerate((list(weights)[::2], list(weights)[1::2])):
        of |= dict.fromkeys(keys, f"{part}.safetensors")
        save_file({k: weights[k].astype(np.float16) for k in keys}, folder / f"{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))
    parts = ClipText(folder)
    first, second = (model.encode_tokens(IDS, ENDS) for model in (whole, parts))
    assert second.dtype == np.float32
    np.testing.assert_allclose(first, second, atol=2e-2)
    assert parts.identity != whole.identity
    assert "2 layers, width 8, before the projection" in parts.describe()


def test_clips_identity_is_of_what_it_computes_and_not_of_its_place(tmp_path):
    first, second = clip(tmp_path / "a"), clip(tmp_path / "b")
    identity = ClipText(first).identity
    assert ClipText(second).identity == identity
    assert ClipText(first, projected=True).identity != identity
    changed = tensors()
    changed["text_model.final_layer_norm.bias"] += 1e-3
    save_file(changed, second / "model.safetensors")
    assert ClipText(second).identity != identity
    other = clip(tmp_path / "c", tokenizer="{ }")
    assert ClipText(other).identity != identity


def test_what_is_no_clip_model_says_why(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"nowhere/config.json: .*Expected a CLIP model"):
        encoder(f"clip:{tmp_path}/nowhere")
    folder = clip(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it was not installed
    with pytest.raises(ImportError, match="pip install tokenizers"):
        ClipText(folder).encode(["a chair"])
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("quick_gelu", "relu"))
    with pytest.raises(WeightsError, match="hidden_act 'relu', expected one of quick_gelu, gelu"):
        ClipText(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="expected a json object"):
        ClipText(folder)
    (folder / "config.json").write_text(config)
    save_file({"a": np.zeros(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="not a CLIP model"):
        ClipText(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(WeightsError, match="damaged"):
        ClipText(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        ClipText(folder)
    clip(tmp_path / "n")
    (tmp_path / "n" / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json"):
        ClipText(tmp_path / "n")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text_config": 3}, "text_config 3, expected a json object"),
        ({"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\], expected one of"),
        ({"num_attention_heads": "2"}, "num_attention_heads '2', expected a number"),
        ({"num_attention_heads": 3}, "num_attention_heads 3, which do not divide the width 8"),
        ({"num_attention_heads": 0}, "num_attention_heads 0, expected a number above 0"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps 'x', expected a number in 0 to 1"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps a number of over 80 digits, expected"),
    ],
)
def test_configs_of_clip_that_make_no_sense(tmp_path, changed, said):
    folder = clip(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    own = config.get("text_config", config)
    (config if "text_config" in changed else own).update(changed)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"config\.json: {said}"):
        ClipText(folder)


def test_tensors_of_clip_that_are_missing_or_do_not_fit(tmp_path):
    folder = clip(tmp_path / "m")
    key = "text_model.encoder.layers.1.mlp.fc1.weight"
    wrong = {"shape": np.zeros((8, 12), np.float32), "scalar": np.zeros((), np.float32)}
    for value in wrong.values():
        save_file(tensors() | {key: value}, folder / "model.safetensors")
        with pytest.raises(WeightsError, match=rf"'{key}' has the shape .*expected \(12, 8\)"):
            ClipText(folder)
    save_file({k: v for k, v in tensors().items() if k != key}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"no '{key}' in its weights: not a CLIP model"):
        ClipText(folder)
    for value, said in ((np.zeros((12, 8), np.int8), "int8"), (np.full((12, 8), np.nan), "finite")):
        save_file(tensors() | {key: value}, folder / "model.safetensors")
        with pytest.raises(WeightsError, match=said):
            ClipText(folder).encode_tokens(IDS, ENDS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "weight_map is None"),
        ({"weight_map": ["a"]}, r"weight_map is \['a'\]"),
        ({"weight_map": {"a": 3}}, "'a' is in 3, no name of a file"),
        ({"weight_map": {"a": "../x"}}, r"'a' is in '\.\./x', no name of a file"),
        ({"weight_map": {"a": "none.safetensors"}}, "no such file, but the model's index"),
        ({"weight_map": {"text_model.x": "part.safetensors"}}, "'text_model.x' is not in part"),
    ],
)
def test_indices_of_parts_that_make_no_sense(tmp_path, content, said):
    folder = clip(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=said):
        ClipText(folder)


def test_captions_are_cut_into_tokens_with_their_ends(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="CLIP's tokens need tokenizers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *"0123456789", "<unk>", "<x>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.RobertaProcessing(
        ("<|endoftext|>", 39), ("<|startoftext|>", 38)
    )
    made.enable_padding(pad_id=0)  # of the file, not to be obeyed
    model = ClipText(clip(tmp_path / "m", tokenizer=made.to_str()))
    ids, ends = model.tokens(["D r", "f g h i j k l m n", ""])
    np.testing.assert_array_equal(ids, IDS)
    np.testing.assert_array_equal(ends, ENDS)
    np.testing.assert_allclose(
        model.encode(["d R", "F g h i j"]), np.array(GOLDEN["quick_gelu", "clip"])[:2], atol=3e-6
    )
    nothing = clip(tmp_path / "n", tokenizer=made.to_str().replace("endoftext", "end"))
    with pytest.raises(WeightsError, match=r"no token <\|endoftext\|>"):
        ClipText(nothing).encode(["a"])
    broken = clip(tmp_path / "o")
    with pytest.raises(WeightsError, match="not a tokenizer"):
        ClipText(broken).encode(["a"])
