"""Values that are sent and predicted, counted against those of the training."""

import asyncio
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from prometheus_client import REGISTRY

from app.artifacts import new_version
from app.drift import ValueCounts
from app.metrics import ValueMetrics
from app.predictor import BaseFeatures, BasePrediction, BasePredictor, Device, ItemError
from app.reference import MAX_FIELDS, REFERENCE, FieldReference, Reference, _field, describe
from tests.service.server import FAKES, PROJECT, Service, Start

ROWS = 100_000


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Features(BaseFeatures):
    amount: float
    count: int
    colour: Colour
    size: Literal["s", "m"]
    note: str
    maybe: float | None = None
    numbers: tuple[float, ...] = ()


class Prediction(BasePrediction):
    score: float
    is_high: bool


class Predictor(BasePredictor[Features, Prediction]):
    example = Features(amount=1, count=1, colour=Colour.RED, size="s", note="")
    allowed_batch_sizes: ClassVar[tuple[int, ...]] = (4, 16)

    def load(self, artifact_dir: Path, device: Device) -> None:
        self.limit = float((artifact_dir / "limit.txt").read_text())

    def predict(self, batch: list[Features]) -> list[Prediction | ItemError]:
        assert len(batch) in self.allowed_batch_sizes
        return [
            Prediction(score=row.amount / 100, is_high=row.amount > self.limit)
            if row.count != 2
            else ItemError("two")
            for row in batch
        ]


def row(number: int) -> Features:
    colour = Colour.RED if number % 4 else Colour.BLUE
    maybe = None if number % 2 else 1.0
    return Features(
        amount=number, count=number % 3, colour=colour, size="m", note=str(number), maybe=maybe
    )


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    """Of the rows from 0 to 299 without those that the model cannot score."""
    (tmp_path / "limit.txt").write_text("149")
    describe(tmp_path, Predictor, [row(number) for number in range(300)])
    return Reference.model_validate_json((tmp_path / REFERENCE).read_bytes())


def test_the_reference_has_a_bin_for_each_tenth_of_the_numbers(reference: Reference) -> None:
    assert reference.rows == 200
    amount = reference.features["amount"]
    assert amount.edges is not None
    assert len(amount.edges) == 9
    assert list(amount.shares.values()) == [pytest.approx(0.1)] * 10 + [0]
    assert list(amount.shares)[-2:] == ["+Inf", "(none)"]
    score = reference.prediction["score"]
    assert [round(edge * 100, 1) for edge in score.edges or ()] == amount.edges


def test_the_reference_has_a_bin_for_each_of_a_few_numbers_and_words(reference: Reference) -> None:
    shares = {name: field.shares for name, field in reference.features.items()}
    unknown = {"(other)": 0, "(none)": 0}
    assert shares["count"] == {"0": 0.5, "1": 0.5, **unknown}
    assert shares["colour"] == {"blue": 0.25, "red": 0.75, **unknown}
    assert shares["size"] == {"m": 1, **unknown}
    assert shares["maybe"] == {"1": 0.5, "+Inf": 0, "(none)": 0.5}
    assert reference.prediction["is_high"].shares == {"false": 0.5, "true": 0.5, **unknown}


def test_what_is_neither_a_number_nor_one_of_a_few_words_has_no_bins(reference: Reference) -> None:
    assert "note" not in reference.features
    assert "numbers" not in reference.features


def test_the_number_of_fields_is_bounded(tmp_path: Path) -> None:
    fields = {f"x{number}": (float, ...) for number in range(MAX_FIELDS + 10)}
    many: Any = type("Many", (BaseFeatures,), {"__annotations__": dict.fromkeys(fields, float)})

    class Wide(Predictor):
        features = many
        allowed_batch_sizes = ()

        def load(self, artifact_dir: Path, device: Device) -> None: ...

        def predict(self, batch: list[Any]) -> list[Prediction | ItemError]:
            return [Prediction(score=1, is_high=True) for _ in batch]

    describe(tmp_path, Wide, [many(**dict.fromkeys(fields, 1.0))] * 100)
    assert len(json.loads((tmp_path / REFERENCE).read_text())["features"]) == MAX_FIELDS


@pytest.mark.parametrize(
    ("value", "name"),
    [(-1, "0.5"), (0.5, "0.5"), (0.51, "2"), (3, "+Inf"), (None, "(none)"), ("x", "+Inf")],
)
def test_a_number_is_in_the_bin_that_ends_above_it(value: object, name: str) -> None:
    assert FieldReference(edges=[0.5, 2], shares={}).bin_of(value) == name


def test_a_word_that_is_new_is_another() -> None:
    words = FieldReference(shares={"other": 0.5, "none": 0.5})
    found = [words.bin_of(value) for value in ("other", "none", "b", True, None)]
    assert found == ["other", "none", "(other)", "(other)", "(none)"]


def test_large_whole_numbers_keep_their_bins() -> None:
    field = _field([1_000_001, 1_000_002, 1_000_002, None])
    assert field
    assert field.shares == {"1000001": 0.25, "1000002": 0.5, "(other)": 0, "(none)": 0.25}
    many = _field(list(range(1_000_000, 1_000_100)))
    assert many
    assert list(many.shares.values()) == [pytest.approx(0.1)] * 10 + [0]


class Shapes(Predictor):
    """Takes rows of one shape at a time, and raises for some."""

    allowed_batch_sizes: ClassVar[tuple[int, ...]] = ()

    def load(self, artifact_dir: Path, device: Device) -> None: ...

    def shape_key(self, row: Features) -> int:
        return len(row.numbers)

    def predict(self, batch: list[Features]) -> list[Prediction | ItemError]:
        assert len({len(row.numbers) for row in batch}) == 1
        if any(row.amount < 0 for row in batch):
            raise ValueError("less than nothing")
        return [Prediction(score=1, is_high=True) for _ in batch]


def shaped(number: int, amount: float) -> Features:
    return row(number).model_copy(update={"numbers": (1.0,) * (number % 3), "amount": amount})


def test_rows_of_a_shape_are_asked_for_together_and_those_that_raise_are_left_out(
    tmp_path: Path,
) -> None:
    rows = [shaped(number, amount=-1 if number % 50 == 0 else 1) for number in range(200)]
    describe(tmp_path, Shapes, rows, leave_out=["count"])
    reference = Reference.model_validate_json((tmp_path / REFERENCE).read_bytes())
    assert reference.rows == 196
    assert "count" not in reference.features


def test_a_sample_that_is_too_small_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of 120 rows 60 could be scored; 100 are needed") as error:
        describe(tmp_path, Shapes, [shaped(number, (-1) ** number) for number in range(120)])
    assert str(error.value.__cause__) == "less than nothing"


def counted(version: str, field: str) -> dict[str, float]:
    return {
        sample.labels["bin"]: sample.value
        for metric in REGISTRY.collect()
        if metric.name == "inference_values"
        for sample in metric.samples
        if sample.name == "inference_values_total"
        and (sample.labels["version"], sample.labels["field"]) == (version, field)
    }


async def count(counts: ValueCounts) -> None:
    """What it does when a second is over, a turn of the loop for each field."""
    counts._count()
    for _ in range(2 + len(counts._fields)):
        await asyncio.sleep(0)


def note(
    reference: Reference,
    version: str,
    amounts: list[int],
    rows_at_a_time: int,
    *,
    skips: bool = False,
) -> int:
    """Count `amounts` as those of one second; gives how many rows were held at most.

    `skips`: rows that need not be looked at are not.
    """

    async def note_all() -> int:
        counts = ValueCounts(reference, ValueMetrics("m", version, ""), rows_per_s=100)
        held = 0
        for first in range(0, len(amounts), rows_at_a_time):
            if skips and counts.may_skip:
                counts.skip()
                continue
            rows = [row(amount) for amount in amounts[first : first + rows_at_a_time]]
            outcomes = [Prediction(score=row.amount / 100, is_high=False) for row in rows]
            counts.note(rows, outcomes)
            held = max(held, len(counts._sample))
        await count(counts)
        return held

    return asyncio.run(note_all())


def test_few_rows_are_counted_exactly(reference: Reference) -> None:
    amounts = list(range(150))
    assert note(reference, "few", amounts, rows_at_a_time=1) == 150
    bins = Counter(reference.features["amount"].bin_of(amount) for amount in amounts)
    found = counted("few", "features.amount")
    assert {name: count for name, count in found.items() if count} == bins
    assert found.keys() == reference.features["amount"].shares.keys()


@pytest.mark.parametrize(
    ("rows_at_a_time", "skips"), [(1, False), (1, True), (7, False), (1000, False)]
)
def test_many_rows_are_estimated_from_a_bounded_sample(
    reference: Reference, rows_at_a_time: int, skips: bool
) -> None:
    chance = random.Random(7)
    amounts = [chance.randrange(300) ** 2 // 300 for _ in range(ROWS)]
    version = f"many-{rows_at_a_time}-{skips}"
    assert note(reference, version, amounts, rows_at_a_time, skips=skips) <= 200
    found = counted(version, "features.amount")
    assert sum(found.values()) == pytest.approx(ROWS, rel=0.25)
    bins = Counter(reference.features["amount"].bin_of(amount) for amount in amounts)
    for name, count in bins.items():
        # Five standard deviations of a share in a sample of a hundred.
        share = count / ROWS
        tolerance = 5 * (share * (1 - share) / 100) ** 0.5
        assert found[name] / sum(found.values()) == pytest.approx(share, abs=tolerance)


def test_what_alternates_is_estimated_as_it_is(reference: Reference) -> None:
    few, many = 1, 299
    for rows in (250, 300, 600, 1000):
        version = f"alternating-{rows}"
        for _ in range(20):
            note(reference, version, [few, many] * (rows // 2), rows_at_a_time=1)
        found = counted(version, "features.amount")
        share = found["+Inf"] / sum(found.values())
        # Six standard deviations of a share in twenty samples of a hundred.
        assert share == pytest.approx(0.5, abs=0.067)


def test_rows_that_cannot_be_scored_are_not_counted(reference: Reference) -> None:
    async def note_one() -> None:
        counts = ValueCounts(reference, ValueMetrics("m", "refused", ""), rows_per_s=100)
        counts.note([row(1), row(5)], [ItemError("no"), Prediction(score=0.05, is_high=False)])
        await count(counts)

    asyncio.run(note_one())
    assert sum(counted("refused", "features.amount").values()) == 1


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Of `double`, with a reference of x from 0 to 99."""
    folder = tmp_path / "artifacts"
    with new_version(folder, "double", input_schema={}) as directory:
        (directory / "factor.txt").write_text("2")
        rows = {f"{x / 10}": 0.1 for x in range(9)}
        field = {"edges": list(map(float, rows)), "shares": {**rows, "+Inf": 0.1}}
        reference = {"rows": 100, "features": {"x": field, "gone": field}, "prediction": {}}
        (directory / REFERENCE).write_text(json.dumps(reference))
    return folder


@pytest.fixture
def predictors(tmp_path: Path) -> Path:
    """Only `double`."""
    folder = tmp_path / "predictors"
    folder.mkdir()
    shutil.copy(FAKES / "double.py", folder)
    return folder


def values(service: Service) -> dict[str, float]:
    """By bin, of all fields that are counted."""
    text = service.client.get("/metrics").text
    found = re.findall(r'^inference_values_total\{bin="([^"]+)",(.*)\} (.+)$', text, re.MULTILINE)
    labels = r'digest="[0-9a-f]{12}",field="features.x",model="double",version="1"'
    assert all(re.fullmatch(labels, label) for _, label, _ in found)
    return {name: float(count) for name, _, count in found if float(count)}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_service_counts_what_is_answered_by_the_cache_too(
    start: Start, artifacts: Path, predictors: Path, workers: int
) -> None:
    service = start(
        PREDICTORS_DIR=predictors, ARTIFACTS_DIR=artifacts, WEB_CONCURRENCY=workers
    ).wait_for("/ready")
    assert values(service) == {}
    for x in (0.05, 0.05, 0.05, 0.35, 7):
        assert service.post_alone("/v1/predict", {"features": {"x": x}}).status_code == 200
    instances = [{"x": 0.05}, {"x": 0.15}]
    service.client.post("/v1/predict/batch", json={"instances": instances})
    service.client.post("/v1/predict", json={"features": {"x": "no number"}})
    expected = {"0.1": 4, "0.2": 1, "0.4": 1, "+Inf": 1}
    service.wait_until(lambda: values(service) == expected)
    text = service.client.get("/metrics").text
    ratio = r'inference_values_expected_ratio\{bin="0.1",.*\} 0.1$'
    assert len(re.findall(ratio, text, re.MULTILINE)) == 1
    assert re.findall(r"inference_values_rows_total\{.*\} (\S+)", text) == ["7.0"]


def test_it_can_be_switched_off(start: Start, artifacts: Path, predictors: Path) -> None:
    service = start(PREDICTORS_DIR=predictors, ARTIFACTS_DIR=artifacts, DRIFT_ROWS_PER_S=0)
    text = service.wait_for("/ready").client.get("/metrics").text
    assert "inference_values_total{" not in text


def test_a_reference_that_cannot_be_read_stops_nothing(
    start: Start, tmp_path: Path, predictors: Path
) -> None:
    with new_version(tmp_path / "broken", "double", input_schema={}) as directory:
        (directory / "factor.txt").write_text("2")
        (directory / REFERENCE).write_text('{"rows": "many"}')
    service = start(PREDICTORS_DIR=predictors, ARTIFACTS_DIR=tmp_path / "broken")
    service.wait_for("/ready")
    warnings = [line["event"] for line in service.log_lines() if line["level"] == "warning"]
    assert [warning for warning in warnings if "drift is not watched" in warning]


def publish_with_sample(
    tmp_path: Path, sample: str
) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """The result of `python -m app.publish double factor.txt --sample`, and the artifacts."""
    folder = tmp_path / "published"
    (tmp_path / "factor.txt").write_text("2")
    (tmp_path / "sample.jsonl").write_text(sample)
    command = [sys.executable, "-m", "app.publish", "double", str(tmp_path / "factor.txt")]
    done = subprocess.run(
        [*command, "--sample", str(tmp_path / "sample.jsonl")],
        cwd=PROJECT,
        env={"PREDICTORS_DIR": str(FAKES), "ARTIFACTS_DIR": str(folder), "DEFAULT_MODEL": "double"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, folder / "double" / "1" / REFERENCE


def test_a_file_is_published_with_a_sample(tmp_path: Path) -> None:
    sample = "".join(json.dumps({"x": x % 2 / 2, "class": "a"}) + "\n" for x in range(100))
    done, path = publish_with_sample(tmp_path, sample)
    assert done.returncode == 0, done.stderr
    reference = Reference.model_validate_json(path.read_bytes())
    assert reference.features["x"].edges == [0, 0.5]
    assert reference.features["kind"].shares == {"a": 1, "(other)": 0, "(none)": 0}
    assert reference.prediction["y"].edges == [0, 1]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ('{"x": 1}\n{"x": "1"}\n', "line 2: x: Input should be a valid number"),
        ('{"x": 1}\n\n', "line 2: JSON: "),
        ("", "has no rows"),
        ('{"x": 1}\n', "ValueError: of 1 rows 1 could be scored; 100 are needed"),
    ],
)
def test_a_sample_with_a_fault_publishes_nothing(tmp_path: Path, sample: str, reason: str) -> None:
    done, path = publish_with_sample(tmp_path, sample)
    assert done.returncode in (1, 2)
    assert reason in done.stderr
    assert not path.exists()
