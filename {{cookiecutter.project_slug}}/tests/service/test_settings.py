"""Settings: where they come from, and that each is explained."""

import re
from pathlib import Path

import pytest

from app.errors import StartupError
from app.settings import Settings, load_settings
from tests.service.server import PROJECT


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without `.env` and pyproject.toml, and without any setting."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_environment_overrides_the_file_and_that_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().port == 8080
    (tmp_path / "pyproject.toml").write_text("[tool.service]\nport = 1\nmax_instances = 2\n")
    (tmp_path / ".env").write_text("PORT=3\nMAX_BODY_BYTES=4\nOTHER=5\n")
    monkeypatch.setenv("PORT", "6")
    settings = load_settings()
    assert (settings.port, settings.max_body_bytes, settings.max_instances) == (6, 4, 2)


def test_all_faults_are_told_at_once_and_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "hunter2")
    monkeypatch.setenv("API_KEYS_SHA256", "hunter2")
    with pytest.raises(StartupError) as caught:
        load_settings()
    message = str(caught.value)
    assert "PORT: " in message
    assert "API_KEYS_SHA256: " in message
    assert "hunter2" not in message
    assert "\n" not in message


def test_words_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "INFO")
    monkeypatch.setenv("DEVICE", "CPU")
    assert (load_settings().log_level, load_settings().device) == ("info", "cpu")


def test_each_is_explained_where_it_is_declared_and_in_the_readme() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([A-Z0-9_]+)` \|", readme, flags=re.MULTILINE))
    assert documented == {name.upper() for name in Settings.model_fields}
    assert all(field.description for field in Settings.model_fields.values())
