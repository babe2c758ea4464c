"""Text encoders: captions in, vectors out. They are not trained; their vectors are data.

`encoder` opens one by its name: "hashed", which needs nothing, or "clip:FOLDER", the text half of
a CLIP model on disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from jaxaccum.data import texts
from jaxaccum.data.base import DataError
from jaxaccum.data.texts import shown, shown_path
from jaxaccum.machine import jax_stand_ins
from jaxaccum.weights.transfer import WeightsError

Vectors = NDArray[np.float32]
CHOICES = "'hashed', 'hashed-WIDTH', 'clip:FOLDER' or 'clip-projected:FOLDER'"


def encoder(name: str) -> HashedText | ClipText:
    """The text encoder of a name.

    "hashed", "hashed-WIDTH": `HashedText`, of width 512 or another one.
    "clip:FOLDER": `ClipText`, its hidden state of the end of the text.
    "clip-projected:FOLDER": the same after the projection into the space of text and images.

    Raises:
      ValueError: no such encoder.
      WeightsError: the folder does not hold a CLIP model.
    """
    kind, colon, folder = name.partition(":")
    if kind in ("clip", "clip-projected") and folder:
        return ClipText(Path(folder), projected=kind == "clip-projected")
    sized = re.fullmatch(r"hashed(?:-([1-9][0-9]{0,5}))?", name, re.ASCII)
    if sized is None or colon:
        raise ValueError(f"no text encoder {name!r}; expected {CHOICES}.")
    return HashedText(int(sized[1] or 512))


# --- hashed words ---

# Words of captions that tell little of a shape.
_FILLERS = frozenset(
    ("a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "is", "it", "its", "of", "on",
     "or", "that", "the", "to", "with")
)  # fmt: skip
_LETTERS = re.compile(r"[^\x00-\x2f\x3a-\x60\x7b-\x7f]+")
_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


class HashedText:
    """Counts of words, pairs of neighbours and pieces of words, each hashed into a place and sign.

    Feature hashing: Weinberger et al. 2009, arXiv:0902.2206; pieces of words as in fastText,
    Bojanowski et al. 2016, arXiv:1607.04606. It tells captions apart and finds words again, but
    knows no meanings: "sofa" and "couch" have nothing in common. Implements `TextEncoder` of
    `data.captions`.

    The same vectors on any machine and any Python: its own hash, no tables of Unicode, and sums
    that are exact.
    """

    # Powers of two, so that sums do not depend on their order.
    _WORD, _PAIR, _PIECE, _FILLER = 1.0, 0.5, 0.25, 0.0625

    def __init__(self, width: int = 512) -> None:
        """width: T, the length of a vector."""
        self.width = width
        self.name = "hashed" if width == 512 else f"hashed-{width}"
        self.identity = hashlib.sha256(f"hashed text 1 {width}".encode()).hexdigest()[:12]

    def describe(self) -> str:
        """What it is, in one line."""
        return f"text encoder {self.name}: hashed words, width {self.width}; no language model"

    def encode(self, captions: Sequence[str]) -> Vectors:
        """(n, T) float32, of length 1; 0 for a caption without a letter or digit."""
        places: dict[str, tuple[list[int], list[float]]] = {}
        vectors = np.zeros((len(captions), self.width), np.float64)
        for row, caption in zip(vectors, captions, strict=True):
            words = _LETTERS.findall(caption.translate(_LOWER))
            spoken = [word for word in words if word not in _FILLERS]
            pairs = (f"{a} {b}" for a, b in itertools.pairwise(spoken))
            for term in (*words, *pairs):
                if term not in places:
                    places[term] = self._places(term)
                at, values = places[term]
                np.add.at(row, at, values)
        lengths = np.sqrt(np.sum(np.square(vectors), axis=1, keepdims=True))
        return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)

    def _places(self, term: str) -> tuple[list[int], list[float]]:
        """Where a word or a pair counts, and what it counts there."""
        if " " in term:
            features = [(f"pair {term}", self._PAIR)]
        elif term in _FILLERS:
            features = [(f"word {term}", self._FILLER)]
        else:
            framed = f"<{term}>"
            pieces = [framed[i : i + n] for n in (3, 4) for i in range(len(framed) - n + 1)]
            features = [(f"word {term}", self._WORD)]
            features += [(f"piece {piece}", self._PIECE) for piece in pieces]
        at, values = [], []
        for feature, value in features:
            digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
            number = int.from_bytes(digest, "little")
            at.append((number >> 1) % self.width)
            values.append(value if number & 1 else -value)
        return at, values


# --- CLIP ---

_END = "<|endoftext|>"
_BATCH = 32
# What a config need not say, as of Hugging Face's CLIPTextConfig.
_DEFAULTS = {"num_attention_heads": 8, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": jax_stand_ins.gelu,
}


class ClipText:
    """The text half of a CLIP model, Radford et al. 2021, arXiv:2103.00020.

    Reads a folder in Hugging Face's layout: config.json, tokenizer.json, and model.safetensors or
    model.safetensors.index.json with its parts. The weights are read when the first caption is to
    be encoded, the images' half never. Implements `TextEncoder` of
    `data.captions`.

    A text without its end is cut to the model's length, which is 77 tokens.
    """

    def __init__(self, folder: Path, projected: bool = False) -> None:
        """Looks at the folder; reads no weights yet.

        Args:
          folder: of the model.
          projected: take the vector after the projection, not normalised; else that before it,
            the hidden state of the end of the text after the last norm.

        Raises:
          WeightsError: the folder does not hold a CLIP model.
        """
        self.name = f"clip{'-projected' if projected else ''}:{folder}"
        self._folder, self._projected = folder, projected
        self._config = _config(folder / "config.json")
        self._files = _tensors(folder)
        self._layers = self._checked_shapes()
        key = "text_projection.weight" if projected else "text_model.final_layer_norm.weight"
        self.width = int(self._shape(key)[0])
        digest = hashlib.sha256(f"clip 1 {projected}".encode())
        for name in ("config.json", "tokenizer.json"):
            digest.update(_read_bytes(folder / name))
        for file in sorted(set(self._files.values())):
            digest.update(_probe(file))
        self.identity = digest.hexdigest()[:12]
        self._weights: dict[str, jax.Array] | None = None
        self._tokenizer: Any = None

    def describe(self) -> str:
        """What it is, in one line."""
        return (
            f"text encoder {self.name}: CLIP, {self._layers} layers, width {self.width}, "
            f"{'after' if self._projected else 'before'} the projection"
        )

    def encode(self, captions: Sequence[str]) -> Vectors:
        """(n, T) float32, not normalised.

        Raises:
          ImportError: the package tokenizers is not installed.
          WeightsError: the weights or the tokenizer cannot be read.
        """
        return self.encode_tokens(*self.tokens(captions))

    def tokens(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n, length) int32, filled up with the end's, and (n,) where the end is."""
        tokenizer = self._tokenizer = self._tokenizer or self._open_tokenizer()
        length, end = self._shape(_POSITIONS)[0], tokenizer.token_to_id(_END)
        ids = np.full((len(captions), length), end, np.int32)
        ends = np.zeros(len(captions), np.int32)
        for row, found in enumerate(tokenizer.encode_batch(list(captions))):
            ids[row, : len(found.ids)] = found.ids
            ends[row] = np.argmax(ids[row] == end)
        return ids, ends

    def encode_tokens(self, ids: np.ndarray, ends: np.ndarray) -> Vectors:
        """The vectors (n, T) float32 of token ids (n, length), taken at `ends` (n,)."""
        # Vectors are kept: they are not to depend on the device that computed them.
        with jax.default_matmul_precision("highest"):
            return self._encode_tokens(ids, ends)

    def _encode_tokens(self, ids: np.ndarray, ends: np.ndarray) -> Vectors:
        weights = self._weights = self._weights or self._read()
        heads, eps = self._config["num_attention_heads"], self._config["layer_norm_eps"]
        scale, bias = (weights[f"text_model.final_layer_norm.{k}"] for k in ("weight", "bias"))
        found = []
        for first in range(0, len(ids), _BATCH):
            part, end = ids[first : first + _BATCH], ends[first : first + _BATCH]
            count = len(part)
            # All batches have one shape, for which the layer is compiled once.
            part = np.pad(part, ((0, _BATCH - count), (0, 0)), mode="edge")
            x = weights[_TOKENS][part] + weights[_POSITIONS][: part.shape[1]]
            for layer in range(self._layers):
                prefix = f"text_model.encoder.layers.{layer}."
                own = {
                    k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)
                }
                x = _layer(x, own, heads, eps, self._config["hidden_act"])
            pooled = _norm(x[np.arange(count), end], scale, bias, eps)
            if self._projected:
                pooled = pooled @ weights["text_projection.weight"].T
            found.append(np.asarray(pooled, np.float32))
        return np.concatenate(found) if found else np.zeros((0, self.width), np.float32)

    def _shape(self, key: str) -> tuple[int, ...]:
        if key not in self._files:
            raise WeightsError(f"{self._folder}: no {key!r} in its weights: not a CLIP model")
        with _opened(self._files[key]) as file:
            return tuple(file.get_slice(key).get_shape())

    def _checked_shapes(self) -> int:
        """The number of layers.

        Raises:
          WeightsError: a tensor is missing, or its shape does not fit the others.
        """
        named = (re.match(r"text_model\.encoder\.layers\.(\d{1,4})\.", key) for key in self._files)
        layers = 1 + max((int(found[1]) for found in named if found), default=-1)
        # Of a shape the first letter is looked up, and those met before have to be the same.
        sizes: dict[str, int] = {}
        wanted = {_TOKENS: "VD", _POSITIONS: "LD"}
        wanted |= {f"text_model.final_layer_norm.{k}": "D" for k in ("weight", "bias")}
        for layer in range(layers):
            wanted |= {f"text_model.encoder.layers.{layer}.{k}": v for k, v in _LAYER.items()}
        if self._projected:
            wanted["text_projection.weight"] = "PD"
        for key, letters in wanted.items():
            shape = self._shape(key)
            fits = len(shape) == len(letters) and all(
                size > 0 and sizes.setdefault(letter, size) == size
                for letter, size in zip(letters, shape, strict=True)
            )
            if not fits:
                expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
                raise WeightsError(
                    f"{shown_path(self._files[key])}: {key!r} has the shape {shape}, expected "
                    f"({expected}): not a CLIP model"
                )
        heads = self._config["num_attention_heads"]
        if sizes["D"] % heads:
            raise WeightsError(
                f"{shown_path(self._folder)}/config.json: num_attention_heads {heads}, which do "
                f"not divide the width {sizes['D']}"
            )
        return layers

    def _read(self) -> dict[str, jax.Array]:
        """The weights of the text half, float32."""
        weights = {}
        for path in sorted(set(self._files.values())):
            with _opened(path) as file:
                for key in (key for key, of in self._files.items() if of == path):
                    try:
                        value = file.get_tensor(key)
                    except (TypeError, AttributeError, ValueError) as error:
                        raise WeightsError(
                            f"{shown_path(path)}: {key!r} cannot be read ({error})"
                        ) from None
                    if value.dtype.kind != "f" and value.dtype != jnp.bfloat16:
                        raise WeightsError(
                            f"{shown_path(path)}: {key!r} holds {value.dtype}, expected numbers "
                            "with fractions"
                        )
                    weights[key] = jnp.asarray(value.astype(np.float32))
                    if not bool(jnp.isfinite(weights[key]).all()):
                        raise WeightsError(
                            f"{shown_path(path)}: {key!r} holds values that are not finite"
                        )
        return weights

    def _open_tokenizer(self) -> Any:
        try:
            package = importlib.import_module("tokenizers")
        except ImportError:
            raise ImportError(
                f"{self.name} needs the package tokenizers: pip install tokenizers, or take the "
                "encoder 'hashed', which needs nothing."
            ) from None
        file = self._folder / "tokenizer.json"
        try:
            tokenizer = package.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing more specific
            raise WeightsError(
                f"{shown_path(file)}: not a tokenizer ({shown(str(error))[1:-1]})"
            ) from None
        if tokenizer.token_to_id(_END) is None:
            raise WeightsError(f"{file}: it has no token {_END}, which every CLIP has")
        if tokenizer.get_vocab_size() > self._shape(_TOKENS)[0]:
            raise WeightsError(
                f"{shown_path(file)}: {tokenizer.get_vocab_size()} tokens, but the model knows "
                f"{self._shape(_TOKENS)[0]}: they are not of one model"
            )
        tokenizer.no_padding()
        tokenizer.enable_truncation(self._shape(_POSITIONS)[0])
        return tokenizer


_TOKENS = "text_model.embeddings.token_embedding.weight"
_POSITIONS = "text_model.embeddings.position_embedding.weight"
# Shapes of a layer's tensors: of the width D, of the layer within its MLP F.
_LAYER = {
    **{f"layer_norm{n}.{k}": "D" for n in (1, 2) for k in ("weight", "bias")},
    **{f"self_attn.{n}_proj.weight": "DD" for n in ("q", "k", "v", "out")},
    **{f"self_attn.{n}_proj.bias": "D" for n in ("q", "k", "v", "out")},
    "mlp.fc1.weight": "FD", "mlp.fc1.bias": "F", "mlp.fc2.weight": "DF", "mlp.fc2.bias": "D",
}  # fmt: skip


@functools.partial(jax.jit, static_argnames=("heads", "eps", "activation"))
def _layer(
    x: jax.Array, weights: dict[str, jax.Array], heads: int, eps: float, activation: str
) -> jax.Array:
    """A block of the transformer, norms first; a token sees itself and those before it."""

    def dense(name: str, value: jax.Array) -> jax.Array:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, value: jax.Array) -> jax.Array:
        return _norm(value, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    count, length, width = x.shape
    y = norm("layer_norm1", x)
    q, k, v = (
        dense(f"self_attn.{name}_proj", y).reshape(count, length, heads, width // heads)
        for name in "qkv"
    )
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(width // heads)
    seen = jnp.tril(jnp.ones((length, length), bool))
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("nhqk,nkhd->nqhd", shares, v).reshape(count, length, width)
    x = x + dense("self_attn.out_proj", mixed)
    y = _ACTIVATIONS[activation](dense("mlp.fc1", norm("layer_norm2", x)))
    return x + dense("mlp.fc2", y)


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * scale + bias


def _config(path: Path) -> dict[str, Any]:
    """What the config says of the text half, checked."""
    config = _read_json(path)
    name, own = shown_path(path), config.get("text_config", config)
    if not isinstance(own, dict):
        raise WeightsError(f"{name}: text_config {shown(own)}, expected a json object")
    found: dict[str, Any] = _DEFAULTS | own
    act, heads, eps = (found[k] for k in ("hidden_act", "num_attention_heads", "layer_norm_eps"))
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise WeightsError(
            f"{name}: hidden_act {shown(act)}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    if type(heads) is not int or not 0 < heads < 10_000:
        raise WeightsError(f"{name}: num_attention_heads {shown(heads)}, expected a number above 0")
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise WeightsError(f"{name}: layer_norm_eps {shown(eps)}, expected a number in 0 to 1")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of safetensors."""
    name = shown_path(path)
    if not path.is_file():
        raise WeightsError(f"{name}: no such file, but the model's index names it")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"{name} is damaged or cut short: {error}") from None
    except OSError as error:
        raise WeightsError(f"cannot read {name}: {error.strerror}") from None


def _tensors(folder: Path) -> dict[str, Path]:
    """Key -> file of the tensors of the text half."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with _opened(single) as file:
            files = dict.fromkeys(file.keys(), single)
    elif index.is_file():
        files = _parts(index)
    else:
        raise WeightsError(
            f"{shown_path(folder)}: no model.safetensors. Expected a CLIP model in Hugging Face's "
            "layout: config.json, tokenizer.json, model.safetensors"
        )
    # Older models keep the numbers of the positions, too.
    return {
        key: file
        for key, file in files.items()
        if key.startswith(("text_model.", "text_projection.")) and not key.endswith("_ids")
    }


def _parts(index: Path) -> dict[str, Path]:
    """Key -> file of a model in parts."""
    name, found = shown_path(index), _read_json(index).get("weight_map")
    if not isinstance(found, dict):
        raise WeightsError(f"{name}: weight_map is {shown(found)}, expected key: file")
    for key, part in found.items():
        if not isinstance(part, str) or not part or re.search(r"[/\\\0]", part):
            raise WeightsError(f"{name}: {shown(key)} is in {shown(part)}, no name of a file")
    there = dict[str, set[str]]()
    for part in sorted(set(found.values())):
        with _opened(index.parent / part) as file:
            there[part] = set(file.keys())
    for key, part in found.items():
        if key not in there[part]:
            raise WeightsError(f"{name}: {shown(key)} is not in {part}, where it should be")
    return {key: index.parent / part for key, part in found.items()}


def _read_bytes(path: Path) -> bytes:
    try:
        return texts.read_bytes(path)
    except DataError as error:
        raise WeightsError(
            f"{error} Expected a CLIP model in Hugging Face's layout: config.json, "
            "tokenizer.json, model.safetensors"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = texts.read_json(path)
    except DataError as error:
        raise WeightsError(
            f"{error} Expected a CLIP model in Hugging Face's layout: config.json, "
            "tokenizer.json, model.safetensors"
        ) from None
    if not isinstance(found, dict):
        raise WeightsError(f"{shown_path(path)}: expected a json object")
    return found


def _probe(file: Path) -> bytes:
    """The size of a file and 64 KiB from each of 64 places: the weights of a large model differ
    everywhere, and reading all of them takes longer than encoding does."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name} {size}".encode())
    with open(file, "rb") as opened:
        for place in range(64):
            opened.seek(place * size // 64)
            digest.update(opened.read(2**16))
    return digest.digest()
