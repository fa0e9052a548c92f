"""Settings: where they come from, and that each is explained."""

import ast
import inspect
from itertools import pairwise
from pathlib import Path

import pytest

from app.errors import StartupError
from app.settings import Settings, load_settings


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


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("PORT", "0", "PORT: Input should be greater than or equal to 1"),
        ("PORT", "65536", "PORT: Input should be less than or equal to 65535"),
        ("DEVICE", "tpu", "DEVICE: Input should be 'auto', 'cpu' or 'cuda'"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL: Input should be 'debug'"),
        ("REQUEST_TIMEOUT_S", "nan", "REQUEST_TIMEOUT_S: Input should be"),
        ("REQUEST_TIMEOUT_S", "30", "SHUTDOWN_GRACE_S has to exceed REQUEST_TIMEOUT_S"),
        ("API_KEYS_SHA256", ",", "API_KEYS_SHA256: Value error, each key"),
        ("QUEUE_MAX_ROWS", "999", "QUEUE_MAX_ROWS has to be at least MAX_INSTANCES"),
        ("QUEUE_MAX_BYTES", "1000000", "QUEUE_MAX_BYTES has to be at least MAX_BODY_BYTES"),
        ("BATCH_POLICY", "guess", "BATCH_POLICY: Input should be 'learned' or 'window'"),
        ("MAX_BODY_BYTES", "1MB", "MAX_BODY_BYTES: Input should be a valid integer"),
    ],
)
def test_what_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError, match="Invalid settings") as caught:
        load_settings()
    assert complaint in str(caught.value)


def test_what_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORT", "DEFAULT_MODEL", "API_KEYS_SHA256"):
        monkeypatch.setenv(name, "")
    settings = load_settings()
    assert (settings.port, settings.default_model, settings.api_keys_sha256) == (8080, None, ())


def test_words_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "INFO")
    monkeypatch.setenv("DEVICE", "CPU")
    assert (load_settings().log_level, load_settings().device) == ("info", "cpu")


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("auto", None, "auto"),
        ("auto", "", "auto"),
        ("auto", "void", "auto"),
        ("auto", "none", "auto"),
        ("auto", "all", "cuda"),
        ("auto", "GPU-1,GPU-2", "cuda"),
        ("cpu", "all", "cpu"),
        ("cuda", None, "cuda"),
    ],
)
def test_a_container_with_gpus_is_expected_to_use_them(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, expected: str
) -> None:
    monkeypatch.setenv("DEVICE", device)
    if visible is not None:
        monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", visible)
    assert load_settings().expected_device == expected


def test_each_is_explained_where_it_is_declared() -> None:
    [declaration] = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(declaration, ast.ClassDef)
    explained = {
        field.target.id
        for field, text in pairwise(declaration.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr)
    }
    assert explained == set(Settings.model_fields)
