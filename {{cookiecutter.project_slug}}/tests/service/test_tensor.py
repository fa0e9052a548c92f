"""Arrays as features: from JSON by either parser, from raw bytes, from Python."""

import json
import math
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any, ClassVar, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from app.predictor import BaseFeatures

pytest.importorskip("numpy")

import numpy as np
from numpy.typing import NDArray

from app import tensor_parser
from app.tensor import Tensor, raw_field
from app.tensor_parser import Parse, parser_for

needs_simdjson = pytest.mark.skipif(
    not tensor_parser.HAS_SIMDJSON, reason="simdjson is not installed"
)


class Image(BaseFeatures):
    pixels: Annotated[NDArray[np.float32], Tensor(2, 3)]


class Labelled(BaseFeatures):
    pixels: Annotated[NDArray[np.float32], Tensor(2, 3)] = Field(description="C order")
    taken: date
    zoom: float = 1.0
    marks: list[str] = Field(default=[])


PIXELS = [[1, 2.5, -3], [4e-3, 5, 6]]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")
    features: BaseFeatures
    parsed: ClassVar[list[bytes]]

    @classmethod
    def model_validate_json(cls, json_data: Any, **options: Any) -> Self:
        cls.parsed.append(json_data)
        return super().model_validate_json(json_data, **options)


def request_of(features: type[BaseFeatures]) -> type[Request]:
    model = create_model("Request", __base__=Request, features=(features, ...))
    model.parsed = []
    return model


def batch_of(features: type[BaseFeatures]) -> type[BaseModel]:
    rows = Annotated[list[features], Field(min_length=1, max_length=4)]  # type: ignore[valid-type]
    return create_model("Batch", __config__=ConfigDict(extra="forbid"), instances=(rows, ...))


def fast(request: type[BaseModel]) -> Parse:
    parse = parser_for(request)
    assert parse is not None
    return parse


@pytest.fixture(autouse=True)
def small_arrays_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parser, "MIN_FAST_NUMBERS", 1)


@pytest.fixture(params=["pydantic", pytest.param("simdjson", marks=needs_simdjson)])
def parser(request: pytest.FixtureRequest) -> Callable[[type[BaseModel]], Parse]:
    return fast if request.param == "simdjson" else lambda model: model.model_validate_json


def body(**features: Any) -> bytes:
    return json.dumps({"features": features}).encode()


def errors_of(call: Callable[[], object]) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as caught:
        call()
    return [(".".join(map(str, e["loc"])), e["msg"]) for e in caught.value.errors()]


# From JSON


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64, np.uint8])
def test_lists_become_a_read_only_array(parser: Any, dtype: Any) -> None:
    class Features(BaseFeatures):
        values: Annotated[NDArray[dtype], Tensor(2, 3)]

    lists = [[1, 2, 3], [4, 5, 250]]
    values = parser(request_of(Features))(body(values=lists)).features.values
    assert values.dtype == dtype
    assert values.tolist() == lists
    assert values.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 9


def test_each_row_of_a_batch_keeps_its_own_array(parser: Any) -> None:
    rows = [{"pixels": (np.array(PIXELS) * n).tolist(), "taken": f"2026-01-0{n}"} for n in (1, 2)]
    content = json.dumps({"instances": rows}).encode()
    first, second = parser(batch_of(Labelled))(content).instances
    assert np.array_equal(second.pixels, 2 * first.pixels)
    assert (first.taken.day, second.taken.day) == (1, 2)


BAD_ARRAYS: list[tuple[str, str, str]] = [
    ("[[1, 2, 3]]", "", "List should have at least 2 items after validation, not 1"),
    ("[[1, 2, 3], [1, 2]]", ".1", "List should have at least 3 items after validation, not 2"),
    ("[[1, 2, 3], [1, 2, 3, 4]]", ".1", "List should have at most 3 items"),
    ("[[1, 2], [3, 4, 5, 6]]", ".0", "List should have at least 3 items after validation, not 2"),
    ("[1, 2, 3, 4, 5, 6]", ".0", "Input should be a valid array"),
    ("[[1, 2, 3], [1, [2, 3], []]]", ".1.1", "Input should be a valid number"),
    ("[[1, 2, 3], [[[[]]], 2, 3]]", ".1.0", "Input should be a valid number"),
    ('[[1, 2, 3], [1, "2", 3]]', ".1.1", "Input should be a valid number"),
    ("[[1, 2, 3], [1, true, 3]]", ".1.1", "Input should be a valid number"),
    ("[[1, 2, 3], [1, null, 3]]", ".1.1", "Input should be a valid number"),
    ("[[1, 2, 3], [1, {}, 3]]", ".1.1", "Input should be a valid number"),
    ("[[1, 2, 3], [1, NaN, 3]]", ".1.1", "Input should be a finite number"),
    ("[[1, 2, 3], [1, -Infinity, 3]]", ".1.1", "Input should be a finite number"),
    ("[[1, 2, 3], [1, 1e999, 3]]", ".1.1", "Input should be a finite number"),
    ("[[1, 2, 3], [1, 1e39, 3]]", "", "within the range of float32, unlike the one at 1.1"),
    ("null", "", "Input should be a valid array"),
    ("{}", "", "Input should be a valid array"),
    ('"AAAA"', "", "Input should be a valid array"),
    ("7", "", "Input should be a valid array"),
]


@pytest.mark.parametrize(("array", "place", "message"), BAD_ARRAYS)
def test_what_is_no_such_array_is_refused_by_place(
    parser: Any, array: str, place: str, message: str
) -> None:
    content = b'{"features": {"pixels": %b}}' % array.encode()
    [(field, found)] = errors_of(lambda: parser(request_of(Image))(content))
    assert field == f"features.pixels{place}"
    assert message in found


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("256", "less than or equal to 255"),
        ("-1", "greater than or equal to 0"),
        ("1.0", "valid integer"),
        (str(2**70), "less than or equal to 255"),
    ],
)
def test_integers_are_integers_of_their_range(parser: Any, number: str, message: str) -> None:
    class Features(BaseFeatures):
        values: Annotated[NDArray[np.uint8], Tensor(2)]

    content = b'{"features": {"values": [7, %b]}}' % number.encode()
    [(field, found)] = errors_of(lambda: parser(request_of(Features))(content))
    assert field == "features.values.1"
    assert message in found


@pytest.mark.parametrize(("dtype", "edge"), [(np.uint64, 2**64 - 1), (np.int64, -(2**63))])
def test_the_widest_integers_are_exact(parser: Any, dtype: Any, edge: int) -> None:
    class Features(BaseFeatures):
        values: Annotated[NDArray[dtype], Tensor(2)]

    parse = parser(request_of(Features))
    assert parse(body(values=[edge, 0])).features.values.tolist() == [edge, 0]
    beyond = edge + (1 if edge > 0 else -1)
    assert [field for field, _ in errors_of(lambda: parse(body(values=[0, beyond])))] == [
        "features.values.1"
    ]


def test_only_the_first_of_many_wrong_numbers_is_reported(parser: Any) -> None:
    class Features(BaseFeatures):
        values: Annotated[NDArray[np.float32], Tensor(5000)]

    parse = parser(request_of(Features))
    assert len(errors_of(lambda: parse(body(values=["x"] * 5000)))) == 1


def test_other_fields_are_as_strict_as_ever(parser: Any) -> None:
    parse = parser(request_of(Labelled))
    row = parse(body(pixels=PIXELS, taken="2026-01-02", zoom=2, marks=["[a]"])).features
    assert (row.taken, row.zoom, row.marks) == (date(2026, 1, 2), 2.0, ["[a]"])
    wrong = body(pixels=PIXELS, taken=1.5, zoom="2", marks=[1], more=0)
    assert {field for field, _ in errors_of(lambda: parse(wrong))} == {
        "features.taken",
        "features.zoom",
        "features.marks.0",
        "features.more",
    }
    assert errors_of(lambda: parse(body(taken="2026-01-02"))) == [
        ("features.pixels", "Field required")
    ]


# The faster parser


@needs_simdjson
def test_a_good_body_reaches_pydantic_without_its_numbers() -> None:
    model = request_of(Labelled)
    content = '{"features": {"pixels": %s, "taken": "2026-01-02", "zoom": 1.50, "marks": ["é["]}}'
    fast(model)((content % json.dumps(PIXELS)).encode())
    [parsed] = model.parsed
    compact = content.replace(": ", ":").replace(", ", ",").replace("1.50", "1.5")
    assert parsed.decode() == compact % "null"


ODD_BODIES = [
    b"",
    b"[]",
    b"null",
    b"{}",
    b'{"features": []}',
    b'{"features": {}, "features": {"pixels": [[1, 2, 3], [4, 5, 6]]}}',
    b'{"features": {"pixels": [[1, 2, 3], [4, 5, 6]]}, "more": 1}',
    b'{"features": {"pixels": [[1, 2, 3], [4, 5, 6]], "pixels": [[6, 5, 4], [3, 2, 1]]}}',
    b'{"features": {"pixels": 1, "pixels": [[1, 2, 3], [4, 5, 6]]}}',
    b'{"features": {"pixels": [[1, 2, 3], [4, 5, 6]], "pixels": 1}}',
    b'{"features": {"pixels": [[1, 2, 3], [4, 5, 6]], "pixels\\u0000": 1}}',
    b'{"features": {"pixels": [[1, 2, 3], [4, 5, 6]]}} x',
    b'\xef\xbb\xbf{"features": {"pixels": [[1, 2, 3], [4, 5, 6]]}}',
    b'{"features": {"pixels": [[1, 2, 3], [4, 5, 6]], "\xff": 1}}',
    # The escapes stand for two brackets, as many as there are lists too many.
    (
        b'{"features": {"pixels": [[1, 2, 3], [4, [5, 6], []]], "taken": "2026-01-02",'
        rb' "marks": ["\u005b\u005b"]}}'
    ),
    b'{"features": {"pixels": %b}}' % (b"[" * 2000 + b"]" * 2000),
    b'{"features": {"pixels": [[1, 2, 3], [4, 5, 6]], "taken": "2026-01-02", "marks": %b}}'
    % (b"[" * 500 + b"]" * 500),
]


def outcome(parse: Parse, content: bytes) -> Any:
    """What `parse` makes of `content`, to be compared: to the bit and the sign of zero."""
    try:
        parsed = parse(content)
    except ValidationError as error:
        return error.errors(include_url=False, include_input=False)
    return repr(parsed.model_dump(mode="json"))


@needs_simdjson
@pytest.mark.parametrize("content", ODD_BODIES)
@pytest.mark.parametrize("features", [Image, Labelled])
def test_odd_bodies_fare_as_with_pydantic_alone(
    content: bytes, features: type[BaseFeatures]
) -> None:
    model = request_of(features)
    assert outcome(fast(model), content) == outcome(model.model_validate_json, content)


NUMBERS = st.integers() | st.floats() | st.integers(-(2**66), 2**66)
VALUES = st.recursive(
    NUMBERS | st.none() | st.booleans() | st.text(max_size=3) | st.sampled_from(["[", "\\", "é"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
LINE = st.lists(NUMBERS, min_size=3, max_size=3) | st.lists(NUMBERS | VALUES, max_size=4)
ARRAYS = st.lists(LINE, min_size=2, max_size=2) | st.lists(LINE, max_size=3) | VALUES
ROWS = (
    st.fixed_dictionaries(
        {"pixels": ARRAYS},
        optional={
            "taken": st.just("2026-01-02") | VALUES,
            "zoom": st.floats() | VALUES,
            "marks": st.lists(st.text(max_size=4)) | VALUES,
            "more": VALUES,
        },
    )
    | VALUES
)


@needs_simdjson
@given(st.lists(ROWS, max_size=3), st.booleans(), st.sampled_from([Image, Labelled]))
def test_any_body_fares_as_with_pydantic_alone(
    rows: list[Any], is_ascii: bool, features: type[BaseFeatures]
) -> None:
    model = batch_of(features)
    content = json.dumps({"instances": rows}, ensure_ascii=is_ascii).encode(errors="ignore")
    assert outcome(fast(model), content) == outcome(model.model_validate_json, content)


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
GOOD_ROWS = st.fixed_dictionaries(
    {
        "pixels": st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=2, max_size=2),
        "taken": st.just("2026-01-02"),
        "zoom": st.floats(allow_nan=False, allow_infinity=False),
        "marks": st.lists(st.text()),
    }
)


@needs_simdjson
@given(st.lists(GOOD_ROWS, min_size=1, max_size=4))
def test_good_numbers_survive_to_the_bit(rows: list[Any]) -> None:
    content = json.dumps({"instances": rows}).encode()
    expected = [(np.array(r["pixels"], "f4").tobytes(), r["zoom"], r["marks"]) for r in rows]
    model = batch_of(Labelled)
    for parse in (fast(model), model.model_validate_json):
        found: Any = parse(content)
        assert [(r.pixels.tobytes(), r.zoom, r.marks) for r in found.instances] == expected


@needs_simdjson
def test_a_null_never_takes_the_array_of_another_field() -> None:
    class Inner(BaseFeatures):
        pixels: Annotated[NDArray[np.float32], Tensor(2, 3)]

    class Outer(BaseFeatures):
        inner: Inner
        pixels: Annotated[NDArray[np.float32], Tensor(2, 3)]

    rows = [{"inner": {"pixels": None}, "pixels": PIXELS}] * 2
    content = json.dumps({"instances": rows}).encode()
    assert [field for field, _ in errors_of(lambda: fast(batch_of(Outer))(content))] == [
        "instances.0.inner.pixels",
        "instances.1.inner.pixels",
    ]
    rows = [{"inner": {"pixels": PIXELS}, "pixels": np.zeros((2, 3)).tolist()}] * 2
    content = json.dumps({"instances": rows}).encode()
    parsed: Any = fast(batch_of(Outer))(content)
    for row in parsed.instances:
        assert row.inner.pixels.any()
        assert not row.pixels.any()


@needs_simdjson
def test_without_a_gain_or_where_it_would_show_there_is_no_faster_parser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Plain(BaseFeatures):
        pixels: list[float]

    class Optional(BaseFeatures):
        pixels: Annotated[NDArray[np.float32], Tensor(2, 3)] | None

    class Renamed(BaseFeatures):
        pixels: Annotated[NDArray[np.float32], Tensor(2, 3)] = Field(alias="image")

    class Limited(BaseFeatures):
        pixels: Annotated[NDArray[np.float32], Tensor(2, 3), AfterValidator(np.negative)]

    class RenamedBeside(Image):
        camera: str = Field(alias="cameraName")

    class Checked(Image):
        @model_validator(mode="before")
        @classmethod
        def check(cls, value: Any) -> Any:
            return value

    class CheckedAfter(Image):
        @model_validator(mode="after")
        def check(self) -> Self:
            assert self.pixels.shape == (2, 3)
            return self

    for features in (Plain, Optional, Renamed, RenamedBeside, Limited, Checked):
        assert parser_for(request_of(features)) is None
    assert parser_for(request_of(CheckedAfter)) is not None

    monkeypatch.setattr(tensor_parser, "MIN_FAST_NUMBERS", 7)
    assert parser_for(request_of(Image)) is None
    monkeypatch.setattr(tensor_parser, "MIN_FAST_NUMBERS", 6)
    assert parser_for(request_of(Image)) is not None
    monkeypatch.setattr(tensor_parser, "HAS_SIMDJSON", False)
    assert parser_for(request_of(Image)) is None


# From Python, and back


def test_an_array_that_could_change_is_copied_and_one_that_cannot_is_not() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    row = Image(pixels=array)
    array[0, 0] = 9
    assert row.pixels[0, 0] == 0
    assert not row.pixels.flags.writeable
    assert Image(pixels=row.pixels).pixels is row.pixels
    turned = np.ones((3, 2), np.float32).T
    assert Image(pixels=turned).pixels.flags.c_contiguous


def test_lists_in_python_are_as_good() -> None:
    row = Image.model_validate({"pixels": PIXELS})
    assert row.pixels.tolist() == np.array(PIXELS, np.float32).tolist()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3)), "array of 2 x 3 float32, not of 2 x 3 float64"),
        (np.zeros((2, 3), ">f4"), "array of 2 x 3 float32, not of"),
        (np.zeros((3, 2), np.float32), "array of 2 x 3 float32, not of 3 x 2 float32"),
        (np.full((2, 3), np.nan, np.float32), "unlike the one at 0.0"),
        (np.array([[0, 0, 0], [0, 0, np.inf]], np.float32), "unlike the one at 1.2"),
        (None, "Input should be a valid list"),
        ((1, 2), "Input should be a valid list"),
    ],
)
def test_other_arrays_are_refused(value: Any, message: str) -> None:
    [(field, found)] = errors_of(lambda: Image(pixels=value))
    assert field == "pixels"
    assert message in found


def test_a_row_goes_to_json_and_comes_back() -> None:
    row = Image(pixels=np.array(PIXELS, np.float32))
    assert row.model_dump()["pixels"] is row.pixels
    assert row.model_dump(mode="json") == {"pixels": row.pixels.tolist()}
    again = Image.model_validate_json(row.model_dump_json())
    assert np.array_equal(again.pixels, row.pixels)


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_the_schema_says_the_shape(mode: Any) -> None:
    class Features(BaseFeatures):
        values: Annotated[NDArray[np.uint8], Tensor(2, 3)] = Field(description="C order")

    [values] = Features.model_json_schema(mode=mode)["properties"].values()
    assert values.pop("description") == "C order"
    assert values == {
        "title": "Values",
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {
            "type": "array",
            "minItems": 3,
            "maxItems": 3,
            "items": {"type": "integer", "minimum": 0, "maximum": 255},
        },
    }
    assert "'number'" in str(Image.model_json_schema(mode=mode))


@pytest.mark.parametrize("shape", [(), (0,), (3, -1)])
def test_a_tensor_has_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="each at least 1"):
        Tensor(*shape)


@pytest.mark.parametrize(
    "annotation",
    [list[float], np.ndarray, NDArray[Any], NDArray[np.str_], NDArray[np.complex64]],
)
def test_a_tensor_has_a_type_of_numbers(annotation: Any) -> None:
    with pytest.raises(TypeError, match=r"annotate a Tensor .*NDArray\[np.float32\]"):
        create_model("Features", __base__=BaseFeatures, x=(Annotated[annotation, Tensor(2)], ...))


# From raw bytes


@pytest.fixture(params=[np.float32, np.float64, np.int64, np.uint8])
def numbers(request: pytest.FixtureRequest) -> NDArray[Any]:
    return np.arange(6).reshape(2, 3).astype(request.param)


def test_raw_bytes_are_the_array(numbers: NDArray[Any]) -> None:
    dtype: Any = numbers.dtype.type

    class Features(BaseFeatures):
        values: Annotated[NDArray[dtype], Tensor(2, 3)]

    raw = raw_field(Features)
    assert raw is not None
    content = numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
    row = raw.read(content)
    assert isinstance(row, Features)
    assert row.values.dtype == numbers.dtype
    assert np.array_equal(row.values, numbers)
    assert not row.values.flags.writeable
    assert np.shares_memory(row.values, np.frombuffer(content, np.uint8))
    with pytest.raises(ValueError, match=f" {len(content)} bytes, not "):
        raw.read(content + b"\0")


def test_raw_bytes_of_another_size_are_refused_with_what_is_expected() -> None:
    raw = raw_field(Image)
    assert raw is not None
    assert raw.size_bytes == 24
    expected = "Input should be 2 x 3 float32, little-endian, in C order: 24 bytes, not 5 bytes"
    assert errors_of(lambda: raw.read(b"12345")) == [("", expected)]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_raw_numbers_are_finite(number: float) -> None:
    raw = raw_field(Image)
    assert raw is not None
    content = np.array([0, 1, 2, 3, number, 5], "<f4").tobytes()
    [(field, message)] = errors_of(lambda: raw.read(content))
    assert field == "pixels"
    assert "unlike the one at 1.1" in message


def test_features_of_one_array_and_nothing_else_can_be_raw() -> None:
    class Plain(BaseFeatures):
        pixels: bytes

    class Optional(BaseFeatures):
        pixels: Annotated[NDArray[np.float32], Tensor(2, 3)] | None

    class Renamed(BaseFeatures):
        pixels: Annotated[NDArray[np.float32], Tensor(1)] = Field(alias="image")

    for features in (Plain, Optional, Labelled):
        assert raw_field(features) is None
    renamed = raw_field(Renamed)
    assert renamed is not None
    assert renamed.read(bytes(4)).model_dump(mode="json", by_alias=True) == {"image": [0.0]}
