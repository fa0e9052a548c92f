"""When two rows are the same, and when a row follows from its JSON."""

from datetime import UTC, date, datetime
from enum import Enum
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, SecretStr, field_serializer, field_validator

from app.canonical import Canonical
from app.predictor import BaseFeatures


class Colour(Enum):
    RED = "r"
    GREEN = "g"


class Inner(BaseFeatures):
    a: int = 0


class Other(BaseFeatures):
    a: int = 0


class Features(BaseFeatures):
    x: float
    name: str = ""
    count: int | None = None
    flag: bool = False
    kind: Literal["even", "odd"] = "odd"
    tags: list[str] = Field(default_factory=list)


class Rich(BaseFeatures):
    x: int | float | str | bool | None = None
    weights: dict[str, float] = Field(default_factory=dict)
    words: frozenset[str] = frozenset()
    at: datetime | None = None
    colour: Colour = Colour.RED
    inner: Inner | Other | None = None
    pairs: list[tuple[str, int]] = Field(default_factory=list)
    hidden: float = Field(default=0, exclude=True)
    rounded: float = 0

    @field_serializer("rounded")
    def _round(self, value: float) -> float:
        return round(value)


class TestCanonical:
    """Equal rows, equal bytes; different rows, different bytes."""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ('{"x": 1, "name": "é"}', '{ "name":"\\u00e9","x":1.0 }'),
            ('{"x": 1e2}', '{"x": 100, "tags": [], "count": null}'),
        ],
    )
    def test_however_the_json_was_written(self, one: str, other: str) -> None:
        canonical = Canonical(Features).of
        rows = [Features.model_validate_json(text) for text in (one, other)]
        assert canonical(rows[0]) == canonical(rows[1])

    def test_what_has_no_order_has_one(self) -> None:
        canonical = Canonical(Rich).of
        one = Rich(weights={"a": 1, "b": 2}, words=frozenset("abcdefgh"))
        other = Rich(weights={"b": 2, "a": 1}, words=frozenset("hgfedcba"))
        assert canonical(one) == canonical(other)

    features = st.builds(
        Features,
        x=st.floats(allow_nan=False, allow_infinity=False),
        name=st.text(max_size=3),
        count=st.none() | st.integers(0, 3),
        flag=st.booleans(),
        kind=st.sampled_from(["even", "odd"]),
        tags=st.lists(st.text(max_size=2), max_size=2),
    )

    @given(features, features)
    def test_it_is_equality(self, one: Features, other: Features) -> None:
        canonical = Canonical(Features).of
        # 0.0 and -0.0 are equal, but a model may divide by them.
        are_equal = one == other and str(one.x) == str(other.x)
        assert (canonical(one) == canonical(other)) == are_equal
        assert canonical(one) == canonical(Features.model_validate_json(one.model_dump_json()))

    different = (
        [Rich(x=value) for value in (None, 0, 1, 1.0, True, False, "", "1", "None")]
        + [Rich(weights={"a": 1}), Rich(weights={"a": 2}), Rich(weights={"b": 1})]
        + [Rich(words=frozenset("a")), Rich(words=frozenset("ab")), Rich(colour=Colour.GREEN)]
        + [Rich(inner=Inner()), Rich(inner=Other()), Rich(inner=Inner(a=1))]
        + [Rich(at=datetime(2026, 1, day, tzinfo=UTC)) for day in (1, 2)]
        + [Rich(pairs=[("a", 1)]), Rich(pairs=[("a", 2)]), Rich(pairs=[("a", 1), ("a", 1)])]
        + [Rich(hidden=1), Rich(rounded=0.1), Rich(rounded=0.2)]
    )

    def test_every_part_of_a_row_counts(self) -> None:
        canonical = Canonical(Rich).of
        assert len({canonical(row) for row in self.different}) == len(self.different)
        assert all(canonical(row) == canonical(row.model_copy(deep=True)) for row in self.different)

    def test_so_do_the_numbers_of_an_array(self) -> None:
        canonical = Canonical(Rich).of
        zeros = np.zeros((2, 2), np.float32)
        others = [np.eye(2, dtype=np.float32), zeros.reshape(4), zeros.astype(np.int32)]
        arrays: list[Any] = [zeros, zeros.copy(), *others]
        keys = [canonical(Rich.model_construct(x=array)) for array in arrays]
        assert keys[0] == keys[1]
        assert len(set(keys)) == 4

    def test_nor_is_what_was_added_to_a_row_left_out(self) -> None:
        class Open(BaseFeatures, extra="allow"):
            x: float

        canonical = Canonical(Open).of
        texts = ['{"x": 1}', '{"x": 1, "age": 3}', '{"x": 1, "age": 99}']
        assert len({canonical(Open.model_validate_json(text)) for text in texts}) == 3

    def test_tuples_with_names_are_told_apart(self) -> None:
        class A(NamedTuple):
            a: int

        class B(NamedTuple):
            b: int

        canonical = Canonical(Rich).of
        rows: list[Any] = [Rich.model_construct(x=value) for value in (A(1), B(1), (1,))]  # type: ignore[arg-type]
        assert len({canonical(row) for row in rows}) == 3

    def test_an_array_of_objects_is_refused(self) -> None:
        array: Any = np.array([object()], dtype=object)
        with pytest.raises(TypeError, match="ndarray"):
            Canonical(Rich).of(Rich.model_construct(x=array))

    def test_a_secret_is_no_part_of_a_key(self) -> None:
        class Login(BaseFeatures):
            password: SecretStr

        with pytest.raises(TypeError, match="SecretStr"):
            Canonical(Login).of(Login(password=SecretStr("x")))


class Plain(BaseFeatures):
    x: float
    name: str = ""


class Checked(Plain):
    @field_validator("x")
    @classmethod
    def _check(cls, x: float) -> float:
        return x


class Initialized(Plain):
    def model_post_init(self, context: Any, /) -> None:
        """Who knows what it does."""


class Dated(Plain):
    born: date = date(2026, 1, 1)


class Named(Plain):
    """Its fields have names that mean something in pydantic's schemas."""

    type: float = 0
    expected: float = 0

    @field_validator("expected")
    @classmethod
    def _check(cls, expected: float) -> float:
        return expected


class NamedInside(Plain):
    metadata: Inner = Inner()


class NamedPlainly(Plain):
    type: str = ""
    expected: float = 0
    metadata: Literal["type", "function-after"] = "type"


class TestFollowsFromJson:
    @pytest.mark.parametrize(
        ("row_type", "follows"),
        [
            (Plain, True),
            (Features, False),
            (Checked, False),
            (Initialized, False),
            (Dated, False),
            (Named, False),
            (NamedInside, False),
            (NamedPlainly, True),
            (Rich, False),
        ],
    )
    def test_whether_a_row_follows_from_its_json(
        self, row_type: type[BaseFeatures], follows: bool
    ) -> None:
        assert Canonical(row_type).follows_from_json is follows
