"""The reference of every key of an experiment file, from the schema's own descriptions."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from raychain.config.experiment import Experiment
from raychain.evaluators import registry
from raychain.evaluators.evaluator import Evaluator
from raychain.paradigms import PARADIGMS
from raychain.schema.component import Component

EXAMPLES = Path(__file__).resolve().parents[1] / "reference" / "keys.yaml"
"""An example of every key, and its unit where it has one."""
LENGTH = "`N steps`, `N samples`, `N epochs` or, of text, `N tokens`"
NAMED = {
    "Epochs": f"length: a number of epochs, or {LENGTH}",
    "Every": f"length: {LENGTH}",
    "Warmup": f"length: {LENGTH}, or `N %` of the stage",
    "Horizon": f"length above zero: {LENGTH}, or `N %` of the stage",
    "Interval": "time or steps: `N seconds`, `N minutes`, `N hours` or `N steps`",
    "Bytes": "size: bytes, or `200GiB`, `500MB`",
    "Seed": "whole number, 0 or more",
    "OneOrMore": "text, or a list of texts",
    "Sources": "address, or a list of addresses and `{shards: …, weight: …}`",
    "AreaRange": "`[low, high]`, shares of the area",
    "Workers": "whole number, or `[min, max]`",
    "AnyStart": "address, or `{checkpoint: …, model: …}`",
    "AnyTask": "mapping",
    "Generates": "mapping `{between, ratios, head_dim}`, or a list of them",
    "Share": "number from 0 to 1",
    "MacsBudget": "MACs: `30 %` of the baseline, `9.5 EMACs`, or a number",
    "EpochRule": "`[epochs, epochs]`",
    "RatioBounds": "`[low, high]`",
    "Lengths": f"list of lengths (epochs, or {LENGTH}), or `{{low, high, step}}`",
    "Amounts": "list of numbers of 0 or more, or `{low, high, step}`",
    "Rates": "list of numbers above 0, or `{low, high, step}`",
    "Warmups": f"list of warm-ups ({LENGTH}, `N %`)",
    "Part": "name, or `{name: …, options}`",
    "Parts": "name, or a list of names and `{name: …, options}`",
    "KeySplit": "`first` or `last`",
    "TrackingUri": "address",
    "Beta": "number", "Rate": "number", "Probability": "number",
    "RateOrRates": "number, or a mapping from models' names to numbers",
    "str": "text", "int": "whole number", "float": "number", "bool": "`true` or `false`",
    "PositiveInt": "whole number, 1 or more",
}  # fmt: skip
"""What the schema's types are called here."""
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class Key(NamedTuple):
    """One key of an experiment file."""

    path: str
    """From the file's top, dots between; `N` stands for a place in a list, `NAME` for a name that the user gives."""
    kind: str
    """Its type in words."""
    default: str
    """YAML of its default; `required` where it has none."""
    text: str
    """Its description."""


class Section(NamedTuple):
    """The keys below one key."""

    path: str
    text: str
    keys: list[Key]


def sections() -> Iterator[Section]:
    """Every mapping of an experiment file in the order of the schema, the file's top first."""
    yield from _below(Experiment, "")
    for name in PARADIGMS.own:
        options = PARADIGMS[name].options
        if len(options.model_fields) > 1:
            yield from _below(options, f"task ({name})")
    for name, evaluator in registry.own().items():
        yield from _below(evaluator, f"evaluate.NAME ({name})")


def examples() -> dict[str, dict[str, Any]]:
    """Path of a key → its `example`, and its `unit` where it has one."""
    return typing.cast(dict[str, dict[str, Any]], yaml.safe_load(EXAMPLES.read_text()))


def configuration_page() -> str:
    """The page as Markdown."""
    known = examples()
    lines = ["# Configuration", "", INTRODUCTION, ""]
    for section in sections():
        lines += [f"## {_title(section.path)}", "", section.text, ""]
        for key in section.keys:
            shown = known.get(shared(key.path), {})
            lines += [f"### `{key.path}` {{: #{_anchor(key.path)} }}", "", key.text, ""]
            lines += [f"- Type: {key.kind}"]
            lines += [f"- Unit: {shown['unit']}"] if "unit" in shown else []
            lines += [f"- Default: {key.default}"]
            if "example" in shown:
                lines += [f"- Example: `{key.path.rpartition('.')[2]}: {_yaml(shown['example'])}`"]
            lines.append("")
    return "\n".join(lines)


INTRODUCTION = """Every key of an experiment file. `raychain run FILE --set train.lr=5e-4` sets one from the command
line, with dots between the keys; a place in a list is its number, from 0: `--set chain.0.epochs=4`. An unknown
key is an error that names the nearest known one. This page is made from the schema in `raychain/config` and
`raychain/schema`."""


def shared(path: str) -> str:
    """The path under which the example of a key stands, for keys that stand in several places."""
    return (path.replace("chain.N.data.captions.", "data.captions.").replace("chain.N.data.train.N", "data.train.N")
            .replace("search.space.generate.N", "generate.N"))  # fmt: skip


def _below(component: type[Component], path: str, before: str = "") -> Iterator[Section]:
    described = _described(component)
    keys, inner = [], []
    for name, field in component.model_fields.items():
        if name in ("type", "paradigm") and path:
            continue
        if component.__name__ == "Evaluate" and name == "named":
            continue
        own = f"{path}.{name}" if path else name
        found = _component(field.annotation)
        text = described.get(name) or (_docstring(found) if found else "")
        keys.append(Key(own, _kind(component, name, field), _default(field), " ".join(text.split())))
        if found and found is not component and not issubclass(found, Evaluator) and found.__name__ != "Task":
            inner.append((found, f"{own}.N" if _listed(field.annotation) else own))
    yield Section(path, before + _docstring(component), keys)
    for found, where in inner:
        yield from _below(found, where)


def _listed(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple or any(map(_listed, typing.get_args(annotation)))


def _component(annotation: Any) -> type[Component] | None:
    """The component in a type, wherever it stands."""
    if isinstance(annotation, type) and not typing.get_origin(annotation):
        return annotation if issubclass(annotation, Component) else None
    return next((found for part in typing.get_args(annotation) if (found := _component(part))), None)


def _described(component: type[Component]) -> dict[str, str]:
    """Field → the text below it in the source."""
    found: dict[str, str] = {}
    for cls in reversed(component.__mro__):
        if issubclass(cls, Component) and cls is not Component:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
            for field, text in itertools.pairwise(body.body if isinstance(body, ast.ClassDef) else []):
                match field, text:
                    case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(said))):
                        found[name] = said
    return found


def _docstring(component: type[Component]) -> str:
    return inspect.getdoc(component) or ""


def _kind(component: type[Component], name: str, field: FieldInfo) -> str:
    """A field's type in words."""
    written = next(str(own[name]) for cls in component.__mro__ if name in (own := inspect.get_annotations(cls)))
    words = _words(ast.parse(written, mode="eval").body, field)
    bounds = [f"{BOUNDS[bound]} {getattr(part, bound)}" for part in field.metadata for bound in BOUNDS
              if getattr(part, bound, None) is not None and not isinstance(getattr(part, bound), str)]  # fmt: skip
    return words + (f", {' and '.join(bounds)}" if bounds and "number" in words else "")


def _words(node: ast.expr, field: FieldInfo) -> str:
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            parts = [_words(left, field), _words(right, field)]
            return " or ".join(dict.fromkeys(parts))
        case ast.Constant(None):
            return "`null`"
        case ast.Constant(value):
            return f"`{value}`"
        case ast.Name(name) if name in NAMED:
            return NAMED[name]
        case ast.Name():
            return "mapping"
        case ast.Subscript(ast.Name("Literal"), inner):
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return ", ".join(f"`{v.value}`" for v in values if isinstance(v, ast.Constant)).replace(", ", " or ", 0)
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([inner, *_])):
            return _words(inner, field)
        case ast.Subscript(ast.Name("tuple"), ast.Tuple([inner, ast.Constant(value)])) if value is ...:
            return f"list ({_words(inner, field)})"
        case ast.Subscript(ast.Name("tuple"), ast.Tuple(elements)):
            return f"list of {len(elements)} ({_words(elements[0], field)} each)"
    return "mapping"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "none: this key is required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Component):
        return "each key's own default"
    return "absent" if value is None else f"`{_yaml(_plain(value))}`"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | types.NoneType | dict | list) else str(value)


def _yaml(value: Any) -> str:
    """YAML of a value on one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
        .strip()
        .removesuffix("\n...")
        .replace("\n", " ")
    )


def _title(path: str) -> str:
    return f"`{path}`" if path else "The file's top"


def _anchor(path: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in path.lower()).strip("-")


if __name__ == "__main__":
    print(json.dumps([key.path for section in sections() for key in section.keys], indent=1))
