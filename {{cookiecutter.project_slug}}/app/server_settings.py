"""The settings that gunicorn's own process needs, read without what reads them for the workers.

That process only watches over the workers. With pydantic it would hold half as much again, for as
long as the service runs, and each start would take longer (docs/performance.md of the template).
"""

import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PORTS = range(1, 65_536)
NUMBERS = {
    "port": PORTS,
    "aip_http_port": PORTS,
    "web_concurrency": range(1, 257),
    "shutdown_grace_s": range(6, 3601),
}
WORDS = {
    "log_level": {"debug", "info", "warning", "error"},
    "log_format": {"auto", "json", "console"},
}
NAMES = {"bind_address", *NUMBERS, *WORDS}


class ServerSettings(NamedTuple):
    """As in `app.settings.Settings`; the port is the one that is listened on."""

    bind_address: str = "0.0.0.0"
    port: int = 8080
    web_concurrency: int = 1
    shutdown_grace_s: int = 30
    log_level: str = "info"
    log_format: str = "auto"


class NotPlainError(ValueError):
    """A value is wrong, or not written as usual."""


def read_server_settings() -> ServerSettings:
    """What `app.settings` comes to as well; a test holds the two against each other.

    Raises:
        SystemExit: pyproject.toml is no TOML, or one of them is invalid: it names every setting
            that is. While these are well, nobody looks at the others here: the workers do, and end
            the start.
    """
    try:
        return _read_plainly()
    except NotPlainError:
        return _read_as_workers_do()
    except tomllib.TOMLDecodeError as error:
        sys.exit(f"pyproject.toml: {error}")


def _read_plainly() -> ServerSettings:
    given = {name: _plain(name, value) for name, value in _given().items() if name in NAMES}
    if "aip_http_port" in given:
        given["port"] = given.pop("aip_http_port")
    return ServerSettings()._replace(**given)


def _given() -> dict[str, object]:
    """What is set, by its name. The sources are those of `app.settings.Settings`."""
    given: dict[str, object] = {}
    if (pyproject := Path("pyproject.toml")).is_file():
        given |= tomllib.loads(pyproject.read_text("utf-8")).get("tool", {}).get("service", {})
        if any(name != name.lower() for name in given):
            raise NotPlainError
    if (dotenv := Path(".env")).exists():
        # Here, as a container has none.
        from dotenv import dotenv_values

        given |= _set(dotenv_values(dotenv, encoding="utf-8"))
    return given | _set(os.environ)


def _set(variables: Mapping[str, str | None]) -> dict[str, str]:
    # The same name may come twice, and may be no more than a name then.
    given = {name.lower(): value for name, value in variables.items() if value != ""}
    return {name: value for name, value in given.items() if value is not None}


def _plain(name: str, value: object) -> Any:
    text = str(value)
    if allowed := NUMBERS.get(name):
        # No longer than an int may be, and in no other digits.
        if text.isascii() and text.isdecimal() and len(text) < 6 and int(text) in allowed:
            return int(text)
    elif words := WORDS.get(name):
        if text.lower() in words:
            return text.lower()
    elif isinstance(value, str):
        return value
    raise NotPlainError


def _read_as_workers_do() -> ServerSettings:
    from app.errors import StartupError
    from app.settings import load_settings

    try:
        settings = load_settings()
    except StartupError as error:
        sys.exit(str(error))
    return ServerSettings(
        settings.bind_address,
        settings.listening_port,
        settings.web_concurrency,
        settings.shutdown_grace_s,
        settings.log_level,
        settings.log_format,
    )
