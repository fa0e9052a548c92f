"""Arrays as features: large numeric input without a Python object for each number.

Predictors that take arrays import this file; nothing else does, and so a service without them
needs no NumPy.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    PydanticKnownError,
    core_schema,
)

from app.predictor import BaseFeatures

Numbers = NDArray[Any]


class Tensor:
    """Makes a field an array of one shape: `Annotated[NDArray[np.float32], Tensor(3, 64, 64)]`.

    The type of the numbers is that of the annotation: a float or an integer of at most 64 bits.
    In JSON the array is lists in lists, in C order, of just this shape: a flat list would hide
    that a caller put the channels last. An integer counts as a float, but 1.0 not as an integer.
    Numbers are finite and within the range of the type.

    In Python, give an array of this shape and type, or the same lists. Arrays in a row are
    read-only; one that could still be written to is copied.
    """

    def __init__(self, *shape: int) -> None:
        if not shape or min(shape) < 1:
            raise ValueError("a Tensor needs its sizes, each at least 1: Tensor(3, 64, 64)")
        self.shape = shape

    def __get_pydantic_core_schema__(self, source: Any, _: GetCoreSchemaHandler) -> CoreSchema:
        dtype = _dtype_of(source)

        def from_lists(value: list[Any] | None, info: ValidationInfo) -> Numbers:
            if value is not None:
                with np.errstate(over="ignore"):
                    array = np.array(value, dtype)
                _check_finite(array)
                return frozen(array)
            # Null is no array, but it is where app.tensor_parser has taken one out.
            if isinstance(info.context, TakenOut) and info.field_name is not None:
                return info.context.next(info.field_name)
            raise PydanticKnownError("list_type")

        def from_array(value: Any, or_lists: Callable[[Any], Numbers]) -> Numbers:
            if not isinstance(value, np.ndarray):
                return or_lists(value)
            if value.dtype != dtype or value.shape != self.shape:
                found = _describe(value.shape, value.dtype)
                raise PydanticCustomError(
                    "tensor_type",
                    "Input should be an array of {expected}, not of {found}",
                    {"expected": _describe(self.shape, dtype), "found": found},
                )
            _check_finite(value)
            is_fixed = value.flags.c_contiguous and not value.flags.writeable
            return value if is_fixed else frozen(value.copy(order="C"))

        lists = core_schema.with_info_after_validator_function(
            from_lists, core_schema.nullable_schema(_nested(self.shape, dtype))
        )
        return core_schema.json_or_python_schema(
            lists,
            core_schema.no_info_wrap_validator_function(from_array, lists),
            serialization=core_schema.plain_serializer_function_ser_schema(
                _to_lists, info_arg=True
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: Any, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return handler(schema["json_schema"]["schema"]["schema"])


class TakenOut:
    """The arrays of a request, by field, in the order of the rows."""

    def __init__(self, fields: dict[str, list[Numbers]]) -> None:
        self._fields: dict[str, Iterator[Numbers]] = {
            name: iter(arrays) for name, arrays in fields.items()
        }

    def next(self, field: str) -> Numbers:
        """
        Raises:
            ValueError: there is none left, as a null of the caller's took one.
        """
        array = next(self._fields.get(field, iter(())), None)
        if array is None:
            raise ValueError
        return array


def _dtype_of(annotation: Any) -> np.dtype[Any]:
    """
    Raises:
        TypeError: the annotation is not NDArray of a type that a Tensor can have.
    """
    for argument in get_args(annotation):
        if get_origin(argument) is np.dtype and isinstance(get_args(argument)[0], type):
            dtype: np.dtype[Any] = np.dtype(get_args(argument)[0])
            if dtype.kind in "fiu" and dtype.itemsize <= 8:
                return dtype
    raise TypeError(
        "annotate a Tensor with its type of numbers, such as "
        "Annotated[NDArray[np.float32], Tensor(3, 64, 64)]"
    )


def _nested(shape: tuple[int, ...], dtype: np.dtype[Any]) -> CoreSchema:
    schema: CoreSchema = core_schema.float_schema(strict=True, allow_inf_nan=False)
    if dtype.kind != "f":
        bounds = np.iinfo(dtype)
        schema = core_schema.int_schema(strict=True, ge=bounds.min, le=bounds.max)
    for size in reversed(shape):
        schema = core_schema.list_schema(
            schema, min_length=size, max_length=size, strict=True, fail_fast=True
        )
    return schema


def _check_finite(array: Numbers) -> None:
    """
    Raises:
        PydanticCustomError: a number is not finite, or was not within the range of its type.
    """
    finite = np.isfinite(array)
    if not finite.all():
        where = ".".join(map(str, np.argwhere(~finite)[0]))
        raise PydanticCustomError(
            "tensor_finite",
            "Input should be finite numbers within the range of {dtype}, unlike the one at {where}",
            {"dtype": array.dtype.name, "where": where},
        )


def _to_lists(array: Numbers, info: SerializationInfo) -> Any:
    return array.tolist() if info.mode_is_json() else array


def frozen(array: Numbers) -> Numbers:
    array.flags.writeable = False
    return array


def _describe(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    return f"{' x '.join(map(str, shape))} {dtype.name}"


@dataclass(frozen=True, slots=True)
class RawTensor:
    """The body that is nothing but the array: its numbers, little-endian, in C order."""

    features: type[BaseFeatures]
    field: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def layout(self) -> str:
        """For people: `3 x 64 x 64 float32, little-endian, in C order: 49152 bytes`."""
        numbers = _describe(self.shape, self.dtype)
        return f"{numbers}, little-endian, in C order: {self.size_bytes} bytes"

    def read(self, body: bytes) -> BaseFeatures:
        """The row whose array is `body`, which is not copied.

        Raises:
            ValidationError: the body has another size, or a number is not finite.
        """
        if len(body) != self.size_bytes:
            raise _refused(f"Input should be {self.layout}, not {len(body)} bytes")
        array = np.frombuffer(body, self.dtype.newbyteorder("<")).reshape(self.shape)
        # Copies on a big-endian machine alone.
        array = array.astype(self.dtype, copy=False)
        return self.features.model_validate({self.field: array}, by_name=True)


def _refused(message: str) -> ValidationError:
    # As a value of the template, for a message is itself one, with braces for its values.
    error = PydanticCustomError("tensor_size", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "body", [InitErrorDetails(type=error, loc=(), input=None)]
    )


def raw_field(features: type[BaseFeatures]) -> RawTensor | None:
    """How to read a raw body as `features`, if those are one Tensor and nothing else."""
    tensors = tensors_in(features)
    if len(features.model_fields) != 1 or not tensors:
        return None
    [(field, (tensor, dtype))] = tensors.items()
    return RawTensor(features, field, tensor.shape, dtype)


def tensors_in(features: type[BaseModel]) -> dict[str, tuple[Tensor, np.dtype[Any]]]:
    """The fields that are a Tensor, not those that may be None or hold some deeper."""
    return {
        name: (item, _dtype_of(field.annotation))
        for name, field in features.model_fields.items()
        for item in field.metadata
        if isinstance(item, Tensor)
    }
