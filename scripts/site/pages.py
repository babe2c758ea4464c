"""What the site has beside docs/: README as its start, the reference, files that pages name.

A link of a page to a file of the repository leads to that file's text in the site. So the pages are
read where the repository is shown, and here.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = {
    "api": ("Python", ["jaxaccum.api"]),
    "accumulate": (
        "Accumulation",
        [f"jaxaccum.accumulate.{m}" for m in ("recipe", "terms", "update", "make", "coupled")]
        + ["jaxaccum.accumulate.equivalence", "jaxaccum.accumulate.checks"],
    ),
    "batchnorm": (
        "Batch norm", ["jaxaccum.accumulate.batchnorm", "jaxaccum.accumulate.linen"],
    ),
    "task": ("A task", ["jaxaccum.tasks.base"]),
    "config": ("Configs", ["jaxaccum.config", "jaxaccum.fields"]),
    "metrics": ("Metrics", ["jaxaccum.metrics.detection", "jaxaccum.metrics.completion"]),
}  # fmt: skip
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".sh": "bash", ".cc": "cpp", ".md": "markdown", ".json": "json"}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that docs/ has not."""
    pages = {"index.md": REPOSITORY / "README.md"}
    pages |= {f.src_uri: Path(f.abs_src_path) for f in files if f.src_uri.endswith(".md")}
    named = {
        target
        for file in pages.values()
        for target in map(lambda m: _named(file, m[1]), _LINK.finditer(file.read_text()))
        if target and not target.startswith("docs/") and target != "README.md"
    }
    files.append(File.generated(config, "index.md", content=pages["index.md"].read_text()))
    for name, (title, modules) in REFERENCE.items():
        parts = "\n\n".join(f"::: {module}" for module in modules)
        files.append(
            File.generated(config, f"reference/{name}.md", content=f"# {title}\n\n{parts}\n")
        )
    for target in sorted(named):
        files.append(File.generated(config, f"source/{target}.md", content=_source(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links to where their targets are in the site."""
    if page.file.src_uri.startswith(("source/", "reference/")):
        return markdown
    here = page.file.src_uri
    file = REPOSITORY / ("README.md" if here == "index.md" else f"docs/{here}")

    def led(match: re.Match[str]) -> str:
        target = _named(file, match[1])
        if target is None:
            return match[0]  # it is not there: mkdocs says so
        if target == "README.md":
            target = "index.md"
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            target = f"source/{target}.md"
        return f"]({os.path.relpath(target, os.path.dirname(here) or '.')}{match[2] or ''})"

    return _LINK.sub(led, markdown)


def _named(file: Path, link: str) -> str | None:
    """What a link in a file names, from the repository's root; None if there is no such file."""
    target = (file.parent / link).resolve()
    if not target.exists() or not target.is_relative_to(REPOSITORY):
        return None
    return target.relative_to(REPOSITORY).as_posix()


def _source(target: str) -> str:
    file = REPOSITORY / target
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if not p.name.startswith((".", "__pyc")))
        return f"# {target}\n\n" + "".join(f"- `{name}`\n" for name in names)
    fence = "````" if "```" in (text := file.read_text()) else "```"
    language = _LANGUAGES.get(file.suffix, "text")
    return f"# {target}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
