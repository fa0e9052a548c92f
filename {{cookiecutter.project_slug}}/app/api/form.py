"""The fields of a form for the features of a model, from their JSON schema."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LONG_TEXT_CHARS = 60
"""A text that may be longer gets more than one line."""

MAX_VALUE_CHARS = 100_000
"""An example may be an image as lists of numbers, and would be sent with each page."""

Schema = Mapping[str, Any]
Kind = Literal["number", "text", "long text", "flag", "choice", "json"]


@dataclass(frozen=True, slots=True)
class FormField:
    """One feature, as something to be filled in."""

    name: str
    kind: Kind
    value: str
    """What it holds at first. Of a flag, a choice and `json` it is JSON."""

    empty: str | None
    """The JSON that it stands for when it is empty; None: the feature is left out."""

    description: str
    hint: str
    choices: list[tuple[str, str]] = field(default_factory=list)
    """Each as JSON and for people."""

    limits: dict[str, str] = field(default_factory=dict)
    """HTML's `min`, `max` and `step` of a number. HTML has no bound that is itself left out."""


def form_fields(schema: Schema, example: Mapping[str, Any]) -> list[FormField]:
    """A field for each property of the object that `schema` describes, with its `example`."""
    definitions = schema.get("$defs", {})
    required = schema.get("required", ())
    return [
        _field(name, _plain(part, definitions), name in required, example)
        for name, part in schema.get("properties", {}).items()
    ]


@dataclass(frozen=True, slots=True)
class _Plain:
    schema: Schema
    may_be_null: bool


def _plain(schema: Schema, definitions: Schema) -> _Plain:
    """`schema` with what it refers to in place, and null told apart."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _plain(_without("$ref", schema, definitions.get(name, {})), definitions)
    options = schema.get("anyOf", [])
    others = [option for option in options if option != {"type": "null"}]
    if len(others) == 1:
        found = _plain(_without("anyOf", schema, others[0]), definitions)
        return _Plain(found.schema, len(options) > 1 or found.may_be_null)
    return _Plain(schema, False)


def _without(key: str, schema: Schema, inner: Schema) -> Schema:
    """`inner`, with what stands beside `key` in `schema`: a description, say."""
    return {**inner, **{name: value for name, value in schema.items() if name != key}}


def _field(name: str, plain: _Plain, is_required: bool, example: Mapping[str, Any]) -> FormField:
    schema = plain.schema
    value = example.get(name, schema.get("default"))
    choices = [(json.dumps(choice), _label(choice)) for choice in _choices(plain)]
    kind: Kind = "choice" if choices else _kind(schema, value)
    hints = [] if is_required else ["optional"]
    if kind == "number":
        hints += _bounds(schema)
    if kind == "json":
        hints.append("as JSON")
    shown = _shown(kind, value)
    if len(shown) > MAX_VALUE_CHARS:
        shown = ""
        hints.append("the example is too long to be filled in; it is in openapi.json")
    return FormField(
        name,
        kind,
        shown,
        _empty(kind, plain, is_required),
        schema.get("description", ""),
        ", ".join(hints),
        choices,
        _limits(schema) if kind == "number" else {},
    )


def _choices(plain: _Plain) -> list[Any]:
    schema = plain.schema
    found = [schema["const"]] if "const" in schema else list(schema.get("enum", ()))
    if plain.may_be_null and schema.get("type") == "boolean":
        found = [True, False]
    return [*found, None] if found and plain.may_be_null else found


def _label(choice: Any) -> str:
    return choice if isinstance(choice, str) else json.dumps(choice)


def _kind(schema: Schema, value: Any) -> Kind:
    match schema.get("type"):
        case "boolean":
            return "flag"
        case "integer" | "number":
            return "number"
        case "string":
            is_long = len(value or "") > LONG_TEXT_CHARS or "\n" in (value or "")
            return "long text" if is_long else "text"
        case _:
            return "json"


def _shown(kind: Kind, value: Any) -> str:
    if kind in ("flag", "choice"):
        return json.dumps(value)
    if value is None:
        return ""
    if kind in ("text", "long text"):
        return str(value)
    # A line for each number of an array would be long.
    return json.dumps(value, indent=2 if isinstance(value, dict) else None, ensure_ascii=False)


def _empty(kind: Kind, plain: _Plain, is_required: bool) -> str | None:
    if plain.may_be_null:
        return "null"
    return '""' if is_required and kind in ("text", "long text") else None


def _limits(schema: Schema) -> dict[str, str]:
    is_whole = schema["type"] == "integer"
    limits = {"step": "1" if is_whole else "any"}
    for name, inclusive, exclusive, next_one in (
        ("min", "minimum", "exclusiveMinimum", 1),
        ("max", "maximum", "exclusiveMaximum", -1),
    ):
        if inclusive in schema:
            limits[name] = json.dumps(schema[inclusive])
        elif exclusive in schema:
            limits[name] = json.dumps(schema[exclusive] + (next_one if is_whole else 0))
    return limits


def _bounds(schema: Schema) -> Iterator[str]:
    """For people."""
    if "minimum" in schema and "maximum" in schema:
        yield f"{schema['minimum']:,} to {schema['maximum']:,}"
        return
    for name, words in (
        ("minimum", "at least"),
        ("exclusiveMinimum", "more than"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "less than"),
    ):
        if name in schema:
            yield f"{words} {schema[name]:,}"
