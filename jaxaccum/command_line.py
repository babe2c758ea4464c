"""The command line of all verbs: words and flags, help, errors in one line, exit statuses.

0: done. 1: what was asked for cannot be done, or not all of it. 2: the words are wrong. 75 and 130:
stopped, see preemption.py. 141: the reader of the output is gone, as `| head` goes.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import app, flags, logging

from jaxaccum import config as configs
from jaxaccum import config_files, start, tasks
from jaxaccum.accumulate import GeometryError
from jaxaccum.data import texts
from jaxaccum.errors import UserError

Examples = Sequence[tuple[str, str]]  # (words after `python -m jaxaccum.`, what they do)

USER_ERRORS = (UserError, GeometryError)  # the core knows no other package
WRONG_WORDS = 2
READER_GONE = 128 + signal.SIGPIPE
_HELP = {"-h", "--help", "-help", "--h", "-?", "--?", "--helpshort", "--helpfull", "-helpfull"}
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # what a text program makes of two hyphens
_MISSING = re.compile(r"Flag --(\w+) must have a value other than None")
_REASONS = {
    errno.EACCES: "permission denied: change the rights, or give another place",
    errno.EPERM: "not permitted: change the rights, or give another place",
    errno.EROFS: "the file system is read-only: give a place that can be written to",
    errno.ENOTDIR: "a part of this path is a file, not a folder: give another path",
    errno.EISDIR: "it is a folder, expected a file: give another path",
    errno.EEXIST: "there is a file of this name where a folder is to be: give another path",
    errno.ENOENT: "no such file or folder: check the path",
    errno.ENAMETOOLONG: "the name is too long for the file system: give a shorter one",
    errno.ELOOP: "a link that leads to itself: give another path",
    errno.EFBIG: "larger than a file may be here: see `ulimit -f`, or take another file system",
    errno.EDQUOT: "the quota of the disk is used up: free some space, or give another place",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "out of memory",
    errno.EAGAIN: "no more processes or threads may be started: see `ulimit -u`",
    errno.EIO: "the disk cannot be read or written: it may be failing, or gone",
    errno.ESTALE: "the network file system no longer has it",
}


class UsageError(Exception):
    """Words that no verb takes; the message says which would do."""


def run_verb(main: Callable[[], int], told: str | None, examples: Examples) -> None:
    """Runs a verb and ends the process with its exit status.

    What a user can mend is said in one line of stderr, without a traceback.

    Args:
      main: does it, once the flags have their values; returns the exit status.
      told: the docstring of the verb's module, for its help.
      examples: for its help.
    """
    start.imported()
    start.prepare()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def parse(argv: list[str]) -> list[str]:
        status = _clear(lambda: _parse(argv, told or "", examples))
        if status:
            sys.exit(status)
        return argv[:1]

    def quietly() -> int:
        logging.set_verbosity(logging.FATAL)  # what matters of libraries' errors is said by us
        sys.unraisablehook = _without_echoes
        return main()

    app.run(lambda _: _clear(quietly), flags_parser=parse)


def _without_echoes(what: Any) -> None:
    """Prints what could not be raised, but for what a save that failed leaves behind: each of the
    writes under way then, hundreds, would say from a thread of its own that nobody waits for it."""
    if str(what.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(what)


def _clear(call: Callable[[], int]) -> int:
    """The exit status of a call; what it raises is said, if a user can mend it."""
    try:
        status = call()
        sys.stdout.flush()
        return status
    except UsageError as error:
        _say(f"error: {error}")
        return WRONG_WORDS
    except USER_ERRORS as error:
        _say(f"error: {error}")
    except KeyboardInterrupt:
        return start.STOPPED_BY_HAND
    except MemoryError:
        _say("error: out of memory. Take a smaller microbatch or smaller images, or a machine "
             "with more memory")  # fmt: skip
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _readers_gone():
            return READER_GONE
        _say(f"error: {explained(error)}")
        _readers_gone()
    except UnicodeError as error:  # a path of bytes that a library wants as UTF-8
        _say(f"error: a path or a name is not UTF-8: {error}. Rename it, or give another")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _say(
            f"error: out of memory ({str(error).splitlines()[0]}). Take a smaller microbatch "
            "(a multiple of bn_group or a part of it), or set remat=blocks. Smaller images are "
            "another recipe."
        )
    return 1


def explained(error: OSError) -> str:
    """What the system says, in words, and of which file."""
    if error.errno == errno.ENOSPC:
        return f"the disk is full: {error}"
    if isinstance(error.filename, str | bytes | os.PathLike):
        where = texts.shown_path(os.fsdecode(error.filename))
        return f"{where}: {_REASONS.get(error.errno or 0, error.strerror or str(error))}"
    return _REASONS.get(error.errno or 0, str(error) or type(error).__name__)


def _say(text: str) -> None:
    """A line on stderr, or on stdout where stderr was closed; nowhere if nobody reads."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    try:
        print(text, file=sys.stdout if start.stderr_was_closed else sys.stderr, flush=True)
    except (OSError, ValueError):
        _readers_gone()


def _readers_gone() -> bool:
    """Whether nobody reads stdout or stderr any more; what is written there goes nowhere then, so
    that the interpreter's last flush does not complain."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            gone = True
        except (OSError, ValueError):  # a full disk, say
            pass
        else:
            gone = gone or _hung_up(stream)
            continue
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    return gone


def _hung_up(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads: what one flush failed to write is lost, so a
    second does not fail."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no file, or no poll on this system
        return False


# --- Words and flags. ---


def _parse(argv: list[str], told: str, examples: Examples) -> int:
    """Gives the flags their values.

    Raises:
      UsageError: a word is no flag, a flag's value is none of its, or one is missing.
      ConfigError: the config cannot be used.
    """
    _refuse_help(argv[1:], told, examples)
    try:
        words = flags.FLAGS.read_flags_from_files(argv, force_gnu=True)[1:]
    except flags.Error as error:
        raise UsageError(_line(error)) from None
    _check_words(words)
    if "config" in flags.FLAGS and not any(name == "config" for name, _ in _given(words)):
        raise UsageError(_no_config(argv[0]))
    flags.FLAGS.set_gnu_getopt(True)  # flags after a word that is none count, too
    try:
        rest = config_files.read_flags(flags.FLAGS, argv)
    except flags.Error as error:
        raise UsageError(_reworded(error)) from None
    if rest:
        raise UsageError(_no_flag(rest[0], words))
    for flag in _own():
        if flag.default is None and flag.value == "":
            raise UsageError(f"--{flag.name} is empty: {flag.help}")
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise UsageError(f"--{flag.name} is a finite number; got {flag.value}")
    if "config" in flags.FLAGS:
        configs.validate(flags.FLAGS["config"].value)
    return 0


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _reworded(error: flags.Error) -> str:
    missing = _MISSING.search(str(error))
    if missing:
        name = missing.group(1)
        return f"--{name} is missing: {flags.FLAGS[name].help}. --help shows examples"
    return _line(error)


def _own() -> list[flags.Flag]:
    """The flags of the verb itself, in the order of their definition."""
    modules = flags.FLAGS.flags_by_module_dict()
    return [*modules.get(sys.argv[0], []), *modules.get(__name__, []),
            *modules.get(config_files.__name__, [])]  # fmt: skip


def _fields() -> dict[str, bool]:
    """Fields of the configs of all tasks, if the verb takes a config: whether true or false."""
    if "config" not in flags.FLAGS:
        return {}
    made = (config_files.fields(configs.defaults(name)) for name in tasks.TASKS)
    return {name: isinstance(value, bool) for each in made for name, value in each}


def _takes(name: str) -> bool | None:
    """Whether a flag takes a value, rather than being true or false; None: there is no such."""
    values, fields = flags.FLAGS, _fields()
    if name.startswith(("config.", "noconfig.")) and fields:
        # Of a field that is not known the config file may know more.
        return not fields.get(name.partition(".")[2], False) and not name.startswith("no")
    if name in values:
        return not values[name].boolean
    if name.startswith("no") and name[2:] in values and values[name[2:]].boolean:
        return False
    return None


def _given(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value) of every flag as it is written; ("", word) of every word that is none."""
    left = iter(words)
    for word in left:
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not name or word.startswith("---"):
            yield "", word
        elif equals:
            yield name, value
        else:
            yield name, next(left, None) if _takes(name) else None


def _check_words(words: Sequence[str]) -> None:
    """Refuses words that are no flag, before anything is loaded.

    Raises:
      UsageError: with the flag that was meant, if that can be guessed.
    """
    values: dict[str, str | None] = {}
    for name, value in _given(words):
        if not name:
            raise UsageError(_no_flag(value or "", words))
        if _takes(name) is None:
            raise UsageError(_no_flag(name if value is None else f"--{name}={value}", words))
        if value is not None and value.startswith("=") and f"--{name}" in words:
            raise UsageError(f"write --{name}=VALUE without spaces around the equals sign")
        if name == "config" and name in values:
            raise UsageError(f"--config is given twice: {values[name]} and {value}")
        if value is not None and values.get(name, value) != value:
            _say(f"note: --{name} is given twice ({values[name]}, then {value}): the last counts")
        values[name] = value


def _no_flag(word: str, words: Sequence[str]) -> str:
    """What to say of a word that is no flag."""
    bare = word.lstrip(_DASHES)
    name, equals, value = bare.partition("=")
    meant = _meant(name, words)
    if not equals and meant is None:
        meant, value = _wanted(bare, words), bare
        equals = "=" if meant else ""
    hint = (
        f"did you mean --{meant}{equals}{value}?" if meant
        else "flags are written --NAME=VALUE; --help shows them"
    )  # fmt: skip
    return f"{texts.shown(word)} is no flag of this verb: {hint}"


def _meant(name: str, words: Sequence[str]) -> str | None:
    """The flag, or the field of the config, that a name is nearest to."""
    own, fields = [flag.name for flag in _own()], list(_fields())
    if name in own:
        return name
    name = name.removeprefix("config.")
    if name in fields:
        return f"config.{name}"
    if close := get_close_matches(name, own, n=1, cutoff=0.85):
        return close[0]
    for known, prefix in ((fields, "config."), (own, "")):
        close = config_files.near(name, known)
        if close:
            return prefix + close[0]
    return None


def _wanted(word: str, words: Sequence[str]) -> str | None:
    """The flag that a word without a name may be the value of."""
    given = {name for name, _ in _given(words)}
    own = [flag.name for flag in _own()]
    if "config" in own and "config" not in given and config_files.split(word)[0].endswith(".py"):
        return "config"
    paths = [name for name in ("workdir", "from", "source") if name in own and name not in given]
    return paths[0] if paths and Path(word).exists() else None


# --- Help. ---


def _no_config(program: str) -> str:
    verb = _verb(program)
    lines = [f"--config is missing. Usage: python -m jaxaccum.{verb} --config=FILE[:arg] [...]"]
    shipped = config_files.shipped()
    if shipped:
        lines.append("These configs ship with jaxaccum:")
        width = max(len(name) for name, _ in shipped)
        lines += [f"  {name:<{width}}  {told}" for name, told in shipped]
    lines.append("--help shows examples and all flags.")
    return "\n".join(lines)


def _verb(program: str) -> str:
    path = Path(program)
    return path.parent.name if path.stem == "__main__" else path.stem


def _refuse_help(words: Sequence[str], told: str, examples: Examples) -> None:
    """Shows the help and ends, if that is what is asked for."""
    asked = _HELP.intersection(words) or words[:1] == ["help"]
    if not asked:
        return
    print("\n".join(_help(told, examples, full=any("helpfull" in word for word in words))))
    sys.stdout.flush()
    sys.exit(0)


def _help(told: str, examples: Examples, full: bool) -> list[str]:
    lines = ["Examples:"] if examples else []
    for command, what in examples:
        lines += [f"  # {what}", f"  python -m jaxaccum.{command}"]
    lines += ["", *told.strip().splitlines(), "", "Flags:"]
    lines += [line for flag in _own() for line in _flag_lines(flag)]
    if "config" in flags.FLAGS:
        lines += ["  --config.FIELD=VALUE", "      another value of a field of the config, such as"
                  " --config.nbs=32; jaxaccum/fields.py, tasks/*/fields.py have all"]  # fmt: skip
        lines += ["", "Configs that ship:"]
        lines += [f"  {name}: {what}" for name, what in config_files.shipped()]
    if not full:
        return [*lines, "", "--helpfull shows the flags of the libraries beneath, too."]
    lines += ["", "Flags of the libraries beneath:"]
    own = {flag.name for flag in _own()}
    others = {flag.name: flag for flag in map(flags.FLAGS.__getitem__, flags.FLAGS)}
    return [*lines, *(line for name in sorted(set(others) - own)
                      for line in _flag_lines(others[name]))]  # fmt: skip


def _flag_lines(flag: flags.Flag) -> list[str]:
    default = flag.default
    shown = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
    tail = f" (default: {shown})" if default not in (None, "", [], False) else ""
    values = getattr(flag.parser, "enum_values", None)
    what = "" if flag.boolean else f"={'|'.join(values) if values else 'VALUE'}"
    wrapped = textwrap.wrap(f"{_line_of(flag.help)}{tail}", 92, break_on_hyphens=False)
    return [f"  --{flag.name}{what}", *(f"      {line}" for line in wrapped)]


def _line_of(text: str | None) -> str:
    return " ".join((text or "").split())
