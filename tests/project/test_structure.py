"""How the modules lean on each other: no circles, nothing up from the core, errors of one base."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

from jaxaccum import command_line, errors
from jaxaccum.accumulate import GeometryError
from jaxaccum.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
VERBS = {
    "train",
    "evaluate",
    "predict",
    "export",
    "convert",
    "pack",
    "calibrate",
    "compare",
    "import_config",
}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in (ROOT / "jaxaccum").rglob("*.py")}


def imports(module: str, also_inside: bool = False) -> set[str]:
    """Modules of the package that a module imports; at its top only, or also inside functions."""
    tree = ast.parse(FILES[module].read_text())
    found = set()
    for node in ast.walk(tree) if also_inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
    return {name for name in found if name in FILES and name != module}


def test_no_module_imports_itself_by_way_of_others():
    """A package and a module in it are two: the first gathers names from the second."""
    edges = {
        module: {name for name in imports(module) if not module.startswith(f"{name}.")}
        for module in FILES
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for name in sorted(edges[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_core_imports_nothing_of_the_rest():
    for module in FILES:
        if module.startswith("jaxaccum.accumulate"):
            others = {n for n in imports(module, True) if not n.startswith("jaxaccum.accumulate")}
            assert not others, f"{module} imports {others}"


def test_nothing_but_its_verb_and_the_api_imports_the_trainer():
    trainer = {"jaxaccum.train", "jaxaccum.training.loop"}
    users = {module for module in FILES if imports(module, True) & trainer}
    assert users == {"jaxaccum.train", "jaxaccum.api"}


def test_verbs_are_leaves():
    """What two of them share lies elsewhere."""
    verbs = {f"jaxaccum.{verb}" for verb in VERBS}
    assert verbs <= set(FILES)
    assert not {(module, verb) for module in FILES for verb in imports(module, True) & verbs}


def test_what_a_user_can_mend_has_one_base():
    assert (errors.UserError, GeometryError) == command_line.USER_ERRORS
    wanted = {
        "ConfigError", "PlanError", "WeightsError", "CheckpointError", "DataError",
        "WrongNumbersError", "DistributedError", "TrainingError", "WorkdirError",
    }  # fmt: skip

    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    importlib.import_module("jaxaccum.train")  # and with it all that define one
    assert wanted <= {kind.__name__ for kind in below(errors.UserError)}


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 100
DATA_TABLES: dict[str, str] = {}  # longer modules that are all data, and why they are: none so far


def sources(*folders: str) -> dict[str, str]:
    """The text of the Python files in folders, by path."""
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def test_no_module_is_long():
    counts = {
        path: len(text.splitlines())
        for path, text in sources("jaxaccum", "configs", "examples").items()
    }
    long = {path: n for path, n in counts.items() if n > MOST_LINES}
    assert long.keys() == DATA_TABLES.keys(), long


def test_no_function_is_long():
    """Docstring, signature and decorators count, too: a function is read in one view."""
    functions = [
        (node.end_lineno - (node.decorator_list or [node])[0].lineno + 1, f"{path}::{node.name}")
        for path, text in sources("jaxaccum", "configs", "examples", "scripts").items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    ]
    assert [(n, where) for n, where in functions if n > MOST_LINES_OF_A_FUNCTION] == []


def test_no_verb_asks_which_task_it_has():
    """What differs lies with the task: a word or a class of a task in a verb is a switch."""
    names = {name for task in TASKS.values() for name in (task.name, task.__name__)}
    # A comparison is of detectors; what the models are is asked by name, in others' configs too.
    own = ("tasks", "data", "models", "weights", "losses", "metrics", "comparing", "config",
           "import_config")  # fmt: skip
    for verb, file in FILES.items():
        if verb.split(".")[1:2] and verb.split(".")[1] in own:
            continue
        tree = ast.parse(file.read_text())
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        words |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not words & names, verb
