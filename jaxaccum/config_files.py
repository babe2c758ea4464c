"""Config files as --config=FILE[:arg] names them: loaded with plain errors, fields overridden."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import jaxaccum
from jaxaccum import config as configs
from jaxaccum.config import ConfigError
from jaxaccum.data import DataError, texts

_FLAG = re.compile(r"--?(no)?config\.([^=]*)(=.*)?", re.DOTALL)
_MODULE = "config_file"  # the name of a config file's module while it runs


def split(spec: str) -> tuple[str, str | None]:
    """The path and the argument, if any, of FILE[:arg]. A path may hold colons, too."""
    path, colon, argument = spec.partition(".py:")
    if colon:
        return f"{path}.py", argument
    path, colon, argument = spec.partition(":")
    return path, argument if colon else None


def default_workdir(config_argument: str) -> Path:
    """runs/NAME for --config=configs/NAME.py, runs/NAME_ARG for --config=configs/NAME.py:ARG."""
    path, argument = split(config_argument)
    return Path("runs") / "_".join(filter(None, [Path(path).stem, argument]))


def find(spec: str) -> str:
    """FILE[:arg], where a bare name stands for the config of that name that ships."""
    path, colon, argument = spec.partition(":")
    file = _folder() / f"{path}.py"
    named = all(part.isidentifier() for part in path.split("/"))
    if not named or Path(path).exists() or not file.is_file():
        return spec
    return f"{_shown(file)}{colon}{argument}"


def _folder() -> Path:
    """The configs that ship: in the package where it is installed, beside it in a clone."""
    package = Path(jaxaccum.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _shown(file: Path) -> str:
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def shipped() -> list[tuple[str, str]]:
    """(path, its first sentence) of every config that comes with this package."""
    patterns = ("*.py", "guides/*.py", "repro/*.py")
    found = []
    for file in [file for pattern in patterns for file in sorted(_folder().glob(pattern))]:
        told = ast.get_docstring(ast.parse(file.read_bytes())) or ""
        found.append((_shown(file), told.partition("\n")[0]))
    return found


def load(spec: str) -> ml_collections.ConfigDict:
    """What get_config of a file returns.

    Args:
      spec: FILE[:arg], or the NAME[:arg] of a config that ships.

    Raises:
      ConfigError: there is no such file, it is no config, or it does not take the argument; one
        line that names the file, and its line where there is one.
    """
    path, argument = split(find(spec))
    shown = texts.shown_path(path)
    get_config = _get_config(path, shown)
    given = [] if argument is None else [argument]
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError:
        raise ConfigError(
            f"{shown}: its get_config() takes no argument after the colon; got {argument!r}"
            if given
            else f"{shown}: its get_config() needs an argument: --config={shown}:ARGUMENT"
        ) from None
    except ValueError:  # a callable without a signature: the call will tell
        pass
    config = _guarded(lambda: get_config(*given), path, shown)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{shown}: get_config() returned {texts.shown(config)}, expected a config: start from "
            "jaxaccum.config.detection(), detection3d() or completion(), and return it"
        )
    _require_fields(config, shown)
    return config


def _get_config(path: str, shown: str) -> Callable[..., Any]:
    try:
        source = texts.read_bytes(path, limit=1 << 24)
    except texts.MissingFileError:
        raise ConfigError(f"--config={shown}: there is no such file. {_instead(path)}") from None
    except DataError as error:
        raise ConfigError(f"--config={error}") from None
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{shown}:{error.lineno}" if error.lineno else shown
        raise ConfigError(f"{where}: not valid Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{shown}: not valid Python: {error}") from None
    module = types.ModuleType(_MODULE)
    module.__file__ = path
    sys.modules[_MODULE] = module  # dataclasses and pickle look there
    _guarded(lambda: exec(code, module.__dict__), path, shown)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(
            f"{shown}: there is no get_config() in it. A config file is Python with a function "
            "get_config() that returns the config, as those in configs/"
        )
    return get_config


def _guarded(call: Callable[[], Any], path: str, shown: str) -> Any:
    """What `call` returns; what it raises becomes one line."""
    try:
        return call()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == path), None)
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{shown if line is None else f'{shown}:{line}'}: {type(error).__name__}"
            f"{f': {said}' if said else ''}"
        ) from error


def _instead(path: str) -> str:
    """What to say where there is no such config."""
    known = [name for name, _ in shipped()]
    by_stem = {Path(name).stem: name for name in known}
    wanted = Path(path).stem
    close = [by_stem[stem] for stem in get_close_matches(wanted, by_stem, n=1, cutoff=0.6)]
    if close:
        return f"Did you mean {close[0]}?"
    return f"These ship: {', '.join(known)}" if known else "Check the path"


def _require_fields(config: ml_collections.ConfigDict, shown: str) -> None:
    """Refuses fields that a file adds: a mistyped one would be ignored."""
    try:
        known = dict(fields(configs.defaults(config.get("task"))))
    except ConfigError as error:
        raise ConfigError(f"{shown}: {error}") from None
    for field in dict(fields(config)):
        if field not in known:
            raise ConfigError(f"{shown}: {no_field(field, known)}")


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, groups left out."""
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def near(name: str, known: Iterable[str]) -> list[str]:
    """The fields that a mistyped name may mean, the likeliest first."""
    known = list(known)
    last = name.rpartition(".")[2].lower()
    same = [field for field in known if field.rpartition(".")[2] == last]
    return same or get_close_matches(name, known, n=3, cutoff=0.5)


def no_field(field: str, known: Iterable[str]) -> str:
    """What to say of a field that a config does not have."""
    known = list(known)
    parts = [name for name in known if name.startswith(f"{field}.")]
    if parts:
        return f"{field!r} is a group of fields: set one of {', '.join(parts)}"
    close = near(field, known)
    hint = f'. Did you mean "{close[0]}"?' if close else f"; it has {', '.join(known)}"
    return f"the config has no field {texts.shown(field)}{hint}"


class _Parser(flags.ArgumentParser):
    """Loads by `load`, and checks the names of the fields that the words override."""

    def __init__(self, words: Callable[[], Sequence[str]]) -> None:
        self._words = words

    def parse(self, path: Any) -> Any:
        config = load(path)
        known = dict(fields(config))
        for word in self._words():
            if not (match := _FLAG.fullmatch(word)):
                continue
            negated, field, _ = match.groups()
            if field not in known:
                raise ConfigError(no_field(field, known))
            if negated and not isinstance(known[field], bool):
                raise ConfigError(f"{word}: config.{field} is not true or false: give a value")
        return config.lock()


def define(
    values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None
) -> flags.FlagHolder[Any]:
    """The flag --config and, by its names, those of the fields.

    Args:
      values: takes it. argv: the words of the command line; those of this process by default.
    """
    holder = config_flags.DEFINE_config_file(
        "config", None, "the config file, and its argument if it takes one", flag_values=values,
        lock_config=True, sys_argv=None if argv is None else list(argv),
    )  # fmt: skip
    values["config"].parser = _Parser(
        lambda: flags.FLAGS.read_flags_from_files(list(sys.argv if argv is None else argv), True)
    )
    return holder


def read_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Gives the flags their values; the words that are no flag.

    Raises:
      ConfigError: a config file, or its fields, are not as they should be.
      flags.Error: any other flag.
    """
    try:
        return values(list(argv))[1:]
    except flags.IllegalFlagValueError as error:
        # absl takes what a parser raises for its own.
        if isinstance(error.__context__, ConfigError):
            raise error.__context__ from None
        raise
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"a field cannot be set: {' '.join(str(error).split())[:300]}") from None


def parse(spec: str, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config that `--config=SPEC --config.key=value ...` gives.

    Raises:
      ConfigError: there is no such file or field, or it does not take the value.
    """
    argv = ["", f"--config={spec}", *(f"--config.{k}={v}" for k, v in overrides.items())]
    values = flags.FlagValues()
    holder = define(values, argv)
    try:
        read_flags(values, argv)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return holder.value
