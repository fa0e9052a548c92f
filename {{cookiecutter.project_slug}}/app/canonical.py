"""A row of features as bytes: equal rows give equal bytes, and different ones different bytes.

What is turned into bytes are the validated values, not their JSON: that may leave fields out,
hide secrets or round, and then two rows that differ would share an answer.
"""

import marshal
from collections.abc import Callable
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic import BaseModel

FORMAT = 2
"""Of marshal. Later ones tell whether two values are one object, which says nothing of a row."""

AS_THEY_ARE = {bool, int, float, complex, str, bytes, type(None)}

BY_REPRESENTATION = (date, time, timedelta, Decimal, UUID)
"""Types of which it says all there is. That of a secret, for one, does not."""

FLAT = frozenset(
    {"model-fields", "model-field", "default", "nullable", "literal", "list"}
    | {"float", "int", "str", "bool"}
)
"""Parts of a pydantic core schema for values that marshal can write, and always in one order."""


class Canonical:
    """Turns rows of one type into bytes."""

    of: Callable[[BaseModel], bytes]
    """Of a row. Raises TypeError: it holds something of which it is not known when two are
    equal."""

    def __init__(self, row_type: type[BaseModel]) -> None:
        schema: Any = row_type.__pydantic_core_schema__
        is_plain_model = schema["type"] == "model" and not row_type.__private_attributes__
        is_closed = row_type.model_config.get("extra") != "allow"
        is_flat = is_plain_model and is_closed and _types_in(schema["schema"]) <= FLAT
        self.of = _of_flat if is_flat else _of_any
        is_made_by_code = schema.get("custom_init") or schema.get("post_init")
        self.follows_from_json = is_flat and not (is_made_by_code or _makes_defaults(schema))
        """Whether the same JSON always gives the same row, whatever the predictor's code does."""


def _of_flat(row: BaseModel) -> bytes:
    try:
        return marshal.dumps(list(row.__dict__.values()), FORMAT)
    except ValueError:
        # A literal can be anything.
        return _of_any(row)


def _of_any(row: BaseModel) -> bytes:
    return marshal.dumps(_plain(row), FORMAT)


def _types_in(schema: Any) -> set[str]:
    if isinstance(schema, dict):
        kind = schema.get("type")
        if not isinstance(kind, str):
            # Of fields by name, which may be any.
            return set().union(*map(_types_in, schema.values()))
        # What is expected of a literal is data, and metadata is for the JSON schema.
        parts = [value for key, value in schema.items() if key not in ("expected", "metadata")]
        return {kind}.union(*map(_types_in, parts))
    return set().union(*map(_types_in, schema)) if isinstance(schema, list | tuple) else set()


def _makes_defaults(schema: Any) -> bool:
    """Whether a field that is left out has a value made for it, which may be the time."""
    if isinstance(schema, dict):
        return "default_factory" in schema or any(map(_makes_defaults, schema.values()))
    return isinstance(schema, list | tuple) and any(map(_makes_defaults, schema))


def _plain(value: Any) -> Any:
    """The same in types that marshal knows."""
    if type(value) in AS_THEY_ARE:
        return value
    if type(value) in (list, tuple):
        return [_plain(item) for item in value]
    # A tuple, which nothing else becomes.
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, tuple):  # one with names
        return kind, [_plain(item) for item in value]
    return kind, _content(value)


def _content(value: Any) -> Any:
    """What makes two values of one type equal; what has no order in one order."""
    if isinstance(value, BaseModel):
        # What a validator or the caller has added counts, too.
        more = (value.__pydantic_extra__ or {}, value.__pydantic_private__ or {})
        return _plain([list(value.__dict__.values()), *more])
    if isinstance(value, Enum):
        return value.name, _plain(value.value)
    if isinstance(value, dict):
        items = [(_plain(key), _plain(item)) for key, item in value.items()]
        return sorted(marshal.dumps(item, FORMAT) for item in items)
    if isinstance(value, set | frozenset):
        return sorted(marshal.dumps(_plain(item), FORMAT) for item in value)
    if isinstance(value, BY_REPRESENTATION):
        return repr(value)
    if _is_array(value):
        return value.dtype.str, list(value.shape), value.tobytes()
    raise TypeError(f"it is not known when two values of type {type(value).__name__} are equal")


def _is_array(value: Any) -> bool:
    """Whether it is a plain NumPy array, or a scalar, of something that its bytes tell of."""
    kind = type(value)
    is_numpy = kind.__module__ == "numpy" and hasattr(value, "dtype")
    return is_numpy and value.dtype.kind in "biufcSUmM"
