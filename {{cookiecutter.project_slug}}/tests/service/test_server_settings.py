"""gunicorn's own process reads some of the settings itself: to what the workers read them."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import server_settings
from app.errors import StartupError
from app.server_settings import NUMBERS, WORDS, ServerSettings, read_server_settings
from app.settings import load_settings

PLAIN: dict[str, list[str]] = {
    **{name: [str(allowed[0]), str(allowed[-1])] for name, allowed in NUMBERS.items()},
    **{name: [*sorted(words), max(words).upper()] for name, words in WORDS.items()},
    "bind_address": ["127.0.0.1", "::"],
}
"""As people write them."""

ODD = ["0", "5", "257", "3601", "65536", "080", " 80 ", "8_0", "+80", "80.0", "8e1", "\u0668"]
ODD += ["9" * 5000, " info", "warn", "true", "${PORT}", ""]


class Sources(NamedTuple):
    project: dict[str, str | int]
    file: dict[str, str]
    environment: dict[str, str]


def sources() -> st.SearchStrategy[Sources]:
    texts = {name: st.sampled_from(values) for name, values in PLAIN.items()}
    # TOML has numbers as well.
    numbers = {name: texts[name] | st.sampled_from([*map(int, PLAIN[name])]) for name in NUMBERS}
    project = st.fixed_dictionaries({}, optional={**texts, **numbers})
    # What is empty in the others is not set.
    texts = {name: values | st.just("") for name, values in texts.items()}
    file = st.fixed_dictionaries({}, optional=texts)
    environment = file.flatmap(lambda values: st.sampled_from([values, upper(values)]))
    return st.builds(Sources, project, file, environment)


def upper(values: dict[str, str]) -> dict[str, str]:
    return {name.upper(): value for name, value in values.items()}


@contextmanager
def in_place(given: Sources) -> Iterator[None]:
    """In a folder of its own, and in the environment, which has none of the others."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.project.items()]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("pyproject.toml").write_text("\n".join(["[tool.service]", *lines]))
        Path(".env").write_text(
            "".join(f"{name}='{value}'\n" for name, value in upper(given.file).items()), "utf-8"
        )
        for name in PLAIN:
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        # A stop has to be longer than a request, which is another matter.
        patch.setenv("REQUEST_TIMEOUT_S", "1")
        for name, value in given.environment.items():
            patch.setenv(name, value)
        yield


def as_workers_do() -> ServerSettings | str:
    try:
        settings = load_settings()
    except StartupError as error:
        return str(error)
    fields = {name: getattr(settings, name) for name in ServerSettings._fields}
    return ServerSettings(**fields | {"port": settings.listening_port})


def as_gunicorn_does() -> ServerSettings | str:
    try:
        return read_server_settings()
    except SystemExit as end:
        return str(end)


def test_the_defaults() -> None:
    with in_place(Sources({}, {}, {})):
        assert as_gunicorn_does() == as_workers_do() == ServerSettings()


def test_a_broken_pyproject_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text("[tool.service]\nport = = 3\n")
    assert as_gunicorn_does() == "pyproject.toml: Invalid value (at line 2, column 8)"


@given(given=sources())
def test_plain_values(given: Sources) -> None:
    with in_place(given), pytest.MonkeyPatch.context() as patch:
        # It would load pydantic, which stays.
        patch.delattr(server_settings, "_read_as_workers_do")
        assert as_gunicorn_does() == as_workers_do()


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", PLAIN)
def test_an_odd_value(name: str, value: str) -> None:
    for source in range(3):
        values: list[Any] = [{}, {}, {}]
        values[source] = {name: value}
        with in_place(Sources(*values)):
            assert as_gunicorn_does() == as_workers_do()


@pytest.mark.parametrize("name", PLAIN)
def test_capitals_in_the_project(name: str) -> None:
    for case in (str.upper, str.capitalize):
        with in_place(Sources({case(name): PLAIN[name][-1]}, {}, {})):
            assert as_gunicorn_does() == as_workers_do() != ServerSettings()


@pytest.mark.parametrize("lines", ["PORT=9005\nport\n", "port\nPORT=9005\n", "PORT\n", "PORT=\n"])
def test_a_name_alone(lines: str) -> None:
    with in_place(Sources({"port": 9000}, {}, {})):
        Path(".env").write_text(lines)
        assert as_gunicorn_does() == as_workers_do()
