"""YAML as experiments need it: plain data, text as keys, each key once, and no more of it than a person writes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode
from yaml.reader import ReaderError

from raychain.core.storage import regular_file

PACKAGE = Path(__file__).resolve().parents[1]
LARGEST = 2**20
"""Bytes of a file."""
DEEPEST = 30
"""Mappings and lists within each other."""
MOST = 50_000
"""Values of a document; what an alias stands for counts each time."""
_TAG = "tag:yaml.org,2002:"
_PLAIN = [f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")]
_KEYS = (f"{_TAG}str", f"{_TAG}merge")


class YamlError(ValueError):
    """The text is no YAML of this kind; the message says where and why in one line."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line
        """Counted from 1, where it is known."""


def read_yaml(text: str | bytes) -> Any:
    """The plain data of one YAML document, in which no two places share a list or mapping. Raises YamlError.

    Dates are text. Bytes may be UTF-8 or, with a byte order mark, UTF-16.
    """
    try:
        loader = _Loader(text)
        try:
            return _apart(loader.get_single_data())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(said, mark.line + 1 if mark else None) from None
    except ReaderError as error:
        end = b"\n" if isinstance(text, bytes) else "\n"
        said = " ".join(str(error).partition("\n")[0].split())
        raise YamlError(said, text[: error.position].count(end) + 1) from None  # type: ignore[arg-type]
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None


def read_yaml_file(path: Path) -> Any:
    """`read_yaml` of a regular file. Raises OSError, or YamlError, also for more than LARGEST bytes."""
    regular_file(path)
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise YamlError(f"more than {LARGEST:,} bytes")
    return read_yaml(content)


def shipped(folder: str = "") -> dict[str, Path]:
    """Name → YAML file of what comes with raychain in `experiments/FOLDER`, in a checkout or an installed wheel."""
    for top in (PACKAGE / "experiments", PACKAGE.parent / "experiments"):
        if top.is_dir():
            return {path.stem: path for path in sorted((top / folder).glob("*.yaml"))}
    return {}


class _Loader(yaml.SafeLoader):
    """PyYAML's, which knows no duplicate keys and follows aliases however often they double."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[Node, int] = {}
        """Values within each complete node."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()
        mark, before = event.start_mark, self._values
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._sizes:
                raise ComposerError(None, None, f"alias *{event.anchor} stands in what it stands for", mark)
            self._values += self._sizes[node]
        else:
            self._depth += 1
            self._values += 1
            if self._depth > DEEPEST:
                raise ComposerError(None, None, f"more than {DEEPEST} levels within each other", mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            if node is not None:
                self._sizes[node] = self._values - before
        if self._values > MOST:
            raise ComposerError(None, None, f"more than {MOST:,} values, aliases followed", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, ScalarNode) or key.tag not in _KEYS:
                shown = f"{key.value}: " if isinstance(key, ScalarNode) else ""
                raise ConstructorError(None, None, f"{shown}a key that is not text; in quotes it is", mark)
            if key.value in lines:
                problem = f"{key.value}: stands twice in one mapping, first on line {lines[key.value]}"
                raise ConstructorError(None, None, problem, mark)
            lines[key.value] = mark.line + 1
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        with contextlib.suppress(ValueError, LookupError, ArithmeticError):  # `!!int x`, numbers with too many digits
            value = super().construct_object(node, deep)
            if not isinstance(value, int) or value.bit_length() <= 64:
                return value
        kind = node.tag.removeprefix(_TAG)
        raise ConstructorError(None, None, f"a value that cannot be read as {kind}", node.start_mark)


_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in [*_PLAIN, None]}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag in _PLAIN or tag in _KEYS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _apart(value: Any) -> Any:
    """A copy in which aliases are copies too, so that a change in one place is none in another."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value
