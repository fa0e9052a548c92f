"""Rows like the predictor's example: with other numbers and choices, and still valid."""

import json
import random
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.predictor import BaseFeatures

MAX_VARIATIONS = 1000
MAX_BYTES = 4 * 1024 * 1024
"""Of all variations, as JSON: images and embeddings are large, and slow to make up."""

SEED = 1

Json = Any


def variations(example: BaseFeatures) -> dict[bytes, BaseFeatures]:
    """`example`, and rows that differ from it and from each other, by the body of a request.

    They are always the same ones, at most `MAX_VARIATIONS`, and fewer of large rows. Of an example
    in which nothing can be varied, such as an image file, it is the only one.
    """
    features = type(example)
    known = example.model_dump(mode="json", by_alias=True)
    schema = features.model_json_schema()
    draw = random.Random(SEED)  # noqa: S311 - the same rows each time
    rows = {body(example): example}
    for _ in range(min(MAX_VARIATIONS, MAX_BYTES // len(body(example))) - 1):
        varied = _vary(known, schema, schema.get("$defs", {}), draw)
        row = _valid(features, known, varied) or example
        rows.setdefault(body(row), row)
    return rows


def body(row: BaseFeatures) -> bytes:
    """The JSON of a request for `row`."""
    return json.dumps({"features": row.model_dump(mode="json", by_alias=True)}).encode()


def _valid(features: type[BaseFeatures], known: Json, varied: Json) -> BaseFeatures | None:
    """`varied`, with those fields as they are `known` that are not valid otherwise."""
    try:
        return features.model_validate_json(json.dumps(varied))
    except ValidationError as error:
        wrong = {details["loc"][0] for details in error.errors() if details["loc"]}
    mended = {name: known[name] if name in wrong else value for name, value in varied.items()}
    try:
        return features.model_validate_json(json.dumps(mended))
    except ValidationError:
        # Fields that do not go together.
        return None


def _vary(value: Json, schema: Mapping[str, Json], named: Json, draw: random.Random) -> Json:
    """Something like `value`, of which `schema` is the JSON schema."""
    schema = _resolve(value, schema, named)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if isinstance(value, bool):
        return draw.random() < 0.5
    if isinstance(value, int | float):
        return _vary_number(value, schema, draw)
    if isinstance(value, list):
        items = schema.get("items", {})
        return [_vary(item, items, named, draw) for item in value]
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        return {
            name: _vary(part, fields.get(name, {}), named, draw) for name, part in value.items()
        }
    return value


def _resolve(value: Json, schema: Mapping[str, Json], named: Json) -> Mapping[str, Json]:
    """`schema`, or what it refers to; of alternatives, the one for what `value` is."""
    if "$ref" in schema:
        return _resolve(value, named.get(schema["$ref"].rpartition("/")[2], {}), named)
    for option in schema.get("anyOf", ()):
        resolved = _resolve(value, option, named)
        if value in resolved.get("enum", ()) or _is_a(value, resolved.get("type")):
            return resolved
    return schema


def _is_a(value: Json, kind: object) -> bool:
    types = {"object": dict, "array": list, "integer": int, "number": int | float}
    return isinstance(kind, str) and isinstance(value, types.get(kind, ()))


def _vary_number(value: float, schema: Mapping[str, Json], draw: random.Random) -> float:
    """From a half of `value` to twice that, or near zero, within the limits of `schema`."""
    factor = 2 ** draw.uniform(-1, 1)
    if isinstance(value, int):
        varied: float = round(value * factor) if value else draw.randint(0, 1)
    else:
        varied = float(f"{value * factor:.6g}") if value else round(draw.random(), 6)
    low: float = schema.get("minimum", varied)
    high: float = schema.get("maximum", varied)
    return max(low, min(high, varied))
