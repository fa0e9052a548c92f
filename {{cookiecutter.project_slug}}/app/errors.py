"""What can go wrong, and how it is said over HTTP: problem details, RFC 9457."""

import math
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MAX_LISTED_ERRORS = 100
"""So that a large body full of mistakes is not answered by a larger one."""

MAX_FIELD_CHARS = 200
"""A field's path can hold a name that the caller made up; this bounds what is repeated."""


PROBLEM_MEDIA_TYPE = "application/problem+json"


class StartupError(Exception):
    """The service cannot start. The message is one line that says what to do about it."""


class FieldError(BaseModel):
    """One thing that is wrong with a request."""

    field: str
    """Path into the body, such as `instances.3.hour_of_day`; `body` for the body itself."""

    message: str
    """What was expected."""


class Problem(BaseModel):
    """The body of every error answer."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[FieldError] | None = None


class ServiceError(Exception):
    """Base of the errors that a caller is told about; `detail` is written for the caller."""

    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    headers: Mapping[str, str] = {}

    def __init__(self, detail: str, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)


class Unauthorized(ServiceError):
    status = HTTPStatus.UNAUTHORIZED
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class ModelNotFound(ServiceError):
    status = HTTPStatus.NOT_FOUND


class BodyTimeout(ServiceError):
    status = HTTPStatus.REQUEST_TIMEOUT
    headers: Mapping[str, str] = {"Connection": "close"}


class TooLarge(ServiceError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class BodyTooLarge(TooLarge):
    """The body is over the limit and was not read whole."""

    headers: Mapping[str, str] = {"Connection": "close"}


class UnsupportedMediaType(ServiceError):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class InvalidInput(ServiceError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class Overloaded(ServiceError):
    """There is more to do than can be done in time; `retry_after` is in seconds."""

    status = HTTPStatus.TOO_MANY_REQUESTS

    def __init__(self, detail: str, retry_after: float = 1) -> None:
        super().__init__(detail)
        self.headers = {"Retry-After": str(max(1, math.ceil(retry_after)))}


class PredictionFailed(ServiceError):
    """The model raised, or broke its contract."""


class OutOfMemory(PredictionFailed):
    """The batch did not fit into memory; a smaller one may."""


class ModelLost(PredictionFailed):
    """Nothing that this process runs on the device will work any more."""


class NotReady(ServiceError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    headers: Mapping[str, str] = {"Retry-After": "1"}


class DeadlineExceeded(ServiceError):
    status = HTTPStatus.GATEWAY_TIMEOUT


def problem(error: ServiceError, request_id: str) -> Problem:
    """The problem document for `error`."""
    return problem_of(error.status, error.detail, request_id, error.errors)


def problem_of(
    status: HTTPStatus, detail: str, request_id: str, errors: Sequence[FieldError] = ()
) -> Problem:
    """The problem document for what is wrong, be it an exception or not."""
    return Problem(
        title=status.phrase,
        status=status,
        detail=detail,
        request_id=request_id,
        errors=list(errors) or None,
    )


def invalid_input(error: ValidationError) -> ServiceError:
    """What pydantic found, without the input itself."""
    found = error.errors(include_url=False, include_input=False)
    for details in found:
        if details["type"] == "too_long" and details["loc"] == ("instances",):
            limit = details["ctx"]["max_length"]
            return TooLarge(f"More than {limit} instances in one request; send them in parts.")
    listed = found[:MAX_LISTED_ERRORS]
    fields = [FieldError(field=_path(item["loc"]), message=_expectation(item)) for item in listed]
    return invalid_fields(fields, count=len(found))


def invalid_fields(errors: list[FieldError], count: int | None = None) -> InvalidInput:
    """A 422 for the fields in `errors`, which may be the first of `count`."""
    count = count or len(errors)
    detail = f"{count} invalid field{'s' if count > 1 else ''}."
    if count > MAX_LISTED_ERRORS:
        detail += f" The first {MAX_LISTED_ERRORS} are listed."
    return InvalidInput(detail, errors[:MAX_LISTED_ERRORS])


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))[:MAX_FIELD_CHARS] or "body"


def _expectation(details: ErrorDetails) -> str:
    # The messages of pydantic's that repeat the caller's value.
    if details["type"] == "union_tag_invalid":
        return f"Input should have a tag from {details['ctx']['expected_tags']}"
    if details["type"] in ("byte_size_unit", "uuid_parsing"):
        return "Input should be a valid value"
    return details["msg"]


def on_one_line(error: BaseException, source: Path) -> str:
    """`error` as one line, with the line of the file `source` that it came through."""
    text = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == source.absolute()]
    where = f" ({source.name}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {text}{where}"
