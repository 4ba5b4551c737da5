"""What mkdocs builds beside the pages in docs/: the reference of keys and commands, and pages that lie elsewhere in the
repository (changelog, evidence), with the files that they link to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from configuration import configuration_page  # noqa: E402
from errors import errors_table  # noqa: E402

ELSEWHERE = ["CHANGELOG.md", "cluster/README.md", *(f"experiments/{name}README.md" for name in (
    "", "evidence/", "growth/", "search/", "benchmarks/", "models/", "fuzz/"))]  # fmt: skip
"""Pages of the site that are no files of docs/."""
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
"""A Markdown link: what stands before the address, the address, and its anchor with the bracket."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is generated, and every file of the repository that a page links to."""
    add = {name: (ROOT / name).read_text() for name in ELSEWHERE}
    add["reference/configuration.md"] = configuration_page()
    add["reference/commands.md"] = commands_page()
    for name, text in add.items():
        files.append(File.generated(config, name, content=text))
    for page in list(files.documentation_pages()):
        for target in _targets(page):
            if files.get_file_from_path(target) is None and (ROOT / target).is_file():
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: object, **_: object) -> str:
    """Turns links that lead out of docs/ into links to the copies in the site."""
    file: File = page.file  # type: ignore[attr-defined]
    markdown = markdown.replace("{{ errors }}", errors_table() if "{{ errors }}" in markdown else "")
    return LINK.sub(lambda found: found[1] + _moved(file, found[2]) + found[3], markdown)


def on_post_page(output: str, **_: object) -> str:
    """Gives the theme's search dialog, and the box that opens it, a name, which those who listen to a page need."""
    for unnamed in ('data-md-component="search" role="dialog"', 'type="checkbox" id="__search"'):
        output = output.replace(unnamed, f'{unnamed} aria-label="Search"')
    return output


def on_post_template(output: str, *, template_name: str, **_: object) -> str:
    """The same on the page for addresses that are not there."""
    return on_post_page(output) if template_name.endswith(".html") else output


def commands_page() -> str:
    """The page of all commands with their options, as Typer writes it from the commands themselves."""
    command = [sys.executable, "-m", "typer", "--app", "commands", "raychain.cli.commands", "utils", "docs",
               "--name", "raychain", "--title", "Commands"]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def _place(file: File) -> Path:
    """The folder of the repository in which a page's links begin."""
    return (ROOT if file.src_uri in ELSEWHERE else ROOT / "docs").joinpath(file.src_uri).parent


def _repository_path(file: File, address: str) -> str | None:
    """The path from the repository's top of what a page links to; None for other addresses."""
    if "://" in address or address.startswith("mailto:"):
        return None
    path = Path(os.path.normpath(_place(file) / address))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None


def _targets(file: File) -> list[str]:
    """The files outside of docs/ that a page links to, as paths from the repository's top."""
    found = [_repository_path(file, match[2]) for match in LINK.finditer(file.content_string)]
    return [path for path in found if path and not path.startswith("docs/")]


def _moved(file: File, address: str) -> str:
    """The address of a link in the site: docs/ is its top, and the rest of the repository lies beside its pages."""
    path = _repository_path(file, address)
    if path is None or ((ROOT / path).is_dir() and not (ROOT / path / "README.md").is_file()):
        return address
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    return os.path.relpath(path.removeprefix("docs/"), Path(file.src_uri).parent)
