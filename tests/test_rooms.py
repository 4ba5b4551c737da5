"""What may import what: no module imports from a room above its own."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raychain"
ROOMS = [
    *("errors", "core", "terminal", "signals", "records", "events", "lease", "schema", "data", "feed", "dataprep"),
    "demo",
    *(
        "models",
        "growth",
        "evaluators",
        "planning",
        "paradigms",
        "config",
        "reporting",
        "pages",
        "exporting",
        "unexpected",
    ),
    *("training", "backend_ray", "runs", "searching", "doctor", "starting", "api", "cli"),
]
"""From the bottom to the top, as in docs/architecture.md."""


def room(module: str) -> str:
    """The first part of a module's name below raychain."""
    return module.split(".")[1]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, but for type checkers alone."""
    tree = ast.parse(file.read_text())
    typing = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING"
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def modules() -> list[Path]:
    """Every module in a room. Those of `python -m raychain.NAME` are none: they call the command line."""
    top = {"__init__.py", "__main__.py", *(f"{file.stem}.py" for file in (PACKAGE / "api").glob("*.py"))}
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.parent != PACKAGE or file.name not in top]


@pytest.mark.parametrize("name", ROOMS)
def test_no_import_goes_up(name: str) -> None:
    files = [file for file in modules() if file.relative_to(PACKAGE).parts[0].removesuffix(".py") == name]
    assert files, f"no room {name}"
    upwards = [
        f"{file.relative_to(PACKAGE)}:{line} imports {found}"
        for file in files
        if file.name != "__main__.py"
        for line, found in imports(file)
        if found.startswith("raychain.") and ROOMS.index(room(found)) > ROOMS.index(name)
    ]
    assert not upwards


def test_every_module_is_in_a_room() -> None:
    assert {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in modules()} <= set(ROOMS)


def test_ray_is_imported_in_its_own_room_alone() -> None:
    """But `ray.tune` where the search is Tune's: its searcher, scheduler and callback are classes of Tune's that know
    chains, trials and their tree. Below `searching` they could only call up again through functions handed down.
    """
    found = [
        f"{file.relative_to(PACKAGE)}:{line} imports {name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] != "backend_ray"
        for line, name in imports(file)
        if name.split(".")[0] == "ray"
        and not (file.parent == PACKAGE / "searching/tune" and f"{name}.".startswith("ray.tune."))
    ]
    assert not found


def test_private_parts_of_ray_are_imported_in_one_module() -> None:
    private = ("ray._", "_internal")
    found = {
        file.name
        for file in sorted(PACKAGE.rglob("*.py"))
        for _, name in imports(file)
        if name.startswith("ray.") and any(part in name for part in private)
    }
    assert found == {"internals.py"}


def test_the_former_name_of_the_data_room_still_leads_there() -> None:
    with pytest.warns(DeprecationWarning, match="raychain.data"):
        from raychain.feed.decode import resize_exactly
    from raychain.data import decode

    assert resize_exactly.__code__.co_code == decode.resize_exactly.__code__.co_code


def test_no_file_is_longer_than_a_person_reads_at_once() -> None:
    long = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert not {file: lines for file, lines in long.items() if lines > 400}


def test_few_places_leave_open_what_is_in_a_dictionary() -> None:
    found = [path for path in PACKAGE.rglob("*.py") for _ in range(path.read_text().count("dict[str, Any]"))]
    assert len(found) < 20, Counter(map(str, found))
