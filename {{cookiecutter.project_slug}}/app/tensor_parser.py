"""Reads JSON with large arrays: simdjson takes the arrays, and pydantic reads the rest."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import numpy as np
from pydantic import BaseModel
from pydantic_core import to_json

from app.tensor import Numbers, TakenOut, Tensor, frozen, tensors_in

try:
    from simdjson import Array, Object, Parser
except ImportError:
    # Without wheels for this Python or machine, pydantic reads all JSON.
    HAS_SIMDJSON = False
else:
    HAS_SIMDJSON = True

MIN_FAST_NUMBERS = 256
"""Rows of fewer numbers are read as fast by pydantic alone (measured)."""

Parse = Callable[[bytes], BaseModel]


def parser_for(request: type[BaseModel]) -> Parse | None:
    """A faster `request.model_validate_json`, or None where there is none.

    It is for the requests {"features": Features} and {"instances": [Features, ...]}, where
    Features have arrays of many numbers. simdjson reads those, and pydantic all else, such as a
    request with another field, which `request` may have beside its first.
    Whatever is unusual or wrong with a body is left to pydantic from the beginning, so the answer
    and the errors are the same by either way.
    """
    key, field = next(iter(request.model_fields.items()))
    is_batch = get_origin(field.annotation) is list
    features: Any = get_args(field.annotation)[0] if is_batch else field.annotation
    tensors = tensors_in(features)
    numbers = sum(math.prod(tensor.shape) for tensor, _ in tensors.values())
    if not HAS_SIMDJSON or numbers < MIN_FAST_NUMBERS or not _can_take_out(features, tensors):
        return None
    reader = _Reader(key, is_batch, list(features.model_fields), tensors)

    def parse(content: bytes) -> BaseModel:
        try:
            rest, taken_out = reader.take_out(content)
            return request.model_validate_json(rest, context=taken_out)
        # simdjson raises RuntimeError for bodies too deep and integers too large.
        except (_Unusual, ValueError, TypeError, RuntimeError):
            return request.model_validate_json(content)

    return parse


def _can_take_out(features: type[BaseModel], tensors: dict[str, Any]) -> bool:
    """Whether no other code and no other name sees the null that is left for an array."""
    validators = features.__pydantic_decorators__
    modes: set[str] = {validator.info.mode for validator in validators.model_validators.values()}
    modes |= {validator.info.mode for validator in validators.field_validators.values()}
    return modes <= {"after"} and all(
        field.validation_alias is None and (name not in tensors or len(field.metadata) == 1)
        for name, field in features.model_fields.items()
    )


class _Unusual(Exception):
    """A body that is left to pydantic."""


@dataclass(frozen=True, slots=True)
class _Reader:
    key: str
    is_batch: bool
    fields: list[str]
    tensors: dict[str, tuple[Tensor, np.dtype[Any]]]

    def take_out(self, content: bytes) -> tuple[bytes, TakenOut]:
        """`content` with null in place of each array, and the arrays.

        Raises:
            _Unusual, ValueError, TypeError, RuntimeError: left to pydantic.
        """
        # simdjson skips a byte order mark. Escapes would upset the count of brackets below.
        if content.startswith(b"\xef") or b"\\" in content:
            raise _Unusual
        document = Parser().parse(content)
        if not isinstance(document, Object) or list(document) != [self.key]:
            raise _Unusual
        arrays: dict[str, list[Numbers]] = {name: [] for name in self.tensors}
        found = document[self.key]
        if not self.is_batch:
            rest = self._row(found, arrays)
        elif isinstance(found, Array):
            rest = b"[%b]" % b",".join([self._row(row, arrays) for row in found])
        else:
            raise _Unusual
        rest = b'{"%b":%b}' % (self.key.encode(), rest)
        # Lists where numbers should be pass all other checks if their numbers add up.
        lists = sum(
            len(arrays[name]) * math.prod(tensor.shape[:depth])
            for name, (tensor, _) in self.tensors.items()
            for depth in range(len(tensor.shape))
        )
        if _brackets(content) != _brackets(rest) + lists:
            raise _Unusual
        return rest, TakenOut(arrays)

    def _row(self, row: Any, arrays: dict[str, list[Numbers]]) -> bytes:
        if not isinstance(row, Object):
            raise _Unusual
        names = list(row)
        # Of a name given twice, pydantic takes the last and simdjson the first.
        if len(set(names)) != len(names):
            raise _Unusual
        items = []
        for name in names:
            value: Any = row[name]
            if name in self.tensors:
                arrays[name].append(_read(value, *self.tensors[name]))
                text = b"null"
            elif name in self.fields:
                is_scalar = isinstance(value, str | float | int | None)
                text = to_json(value) if is_scalar else value.mini
            else:
                raise _Unusual
            items.append(b'"%b":%b' % (name.encode(), text))
        return b"{" + b",".join(items) + b"}"


def _read(value: Any, tensor: Tensor, dtype: np.dtype[Any]) -> Numbers:
    if not _has_shape(value, tensor.shape):
        raise _Unusual
    is_float = dtype.kind == "f"
    buffer = value.as_buffer(of_type="d" if is_float else "i")
    wide = np.frombuffer(buffer, np.float64 if is_float else np.int64)
    with np.errstate(over="ignore"):
        array = wide.astype(dtype, copy=False).reshape(tensor.shape)
    if not (np.isfinite(array).all() if is_float else np.array_equal(array.ravel(), wide)):
        raise _Unusual
    return frozen(array)


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, Array) or len(value) != shape[0]:
        return False
    return len(shape) == 1 or all(_has_shape(part, shape[1:]) for part in value)


def _brackets(text: bytes) -> int:
    # Ten times as fast as text.count.
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("[")))
