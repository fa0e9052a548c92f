"""Starting: probes tell loading from ready, and what cannot work stops with one line."""

import hashlib
import os
import resource
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest

from app import artifacts
from app.artifacts import new_version
from app.discovery import SOURCE_SHA256, discover
from app.errors import StartupError
from app.repository import ModelRepository
from app.settings import Settings
from tests.service.server import FAKES, PROJECT, Service, Start, publish

PREDICTOR = (FAKES / "double.py").read_text(encoding="utf-8")


def predictors(directory: Path, **sources: str) -> Path:
    """A folder with a predictor file for each of `sources`."""
    folder = directory / "predictors"
    folder.mkdir()
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def refusal(service: Service) -> str:
    """What the service said before it ended on its own."""
    assert service.exit_code() not in (0, -9)
    critical = [line["event"] for line in service.log_lines() if line["level"] == "critical"]
    assert len(critical) == 1, service.log
    assert "\n" not in critical[0]
    assert "Traceback" not in service.log
    line: str = critical[0]
    return line


def test_probes_answer_while_a_model_loads(start: Start, tmp_path: Path, pipe: Path) -> None:
    slow = PREDICTOR.replace("self.factor = ", f"Path({str(pipe)!r}).read_text(); self.factor = ")
    settings = {"PREDICTORS_DIR": predictors(tmp_path, double=slow)}
    service = start(**settings).wait_for("/health")

    for probe in ("/startup", "/ready"):
        answer = service.client.get(probe)
        assert answer.status_code == 503
        assert answer.json()["status"] == "loading"
        assert answer.json()["models"]["double"]["state"] == "loading"
    assert service.client.get("/ping").status_code == 503
    assert service.predict("double", x=1).status_code == 503
    assert service.client.get("/v1/models").json()["models"][0]["state"] == "loading"

    pipe.write_text("go")
    service.wait_for("/startup")
    ready = service.wait_for("/ready").client.get("/ready").json()
    assert ready == {
        "status": "ready",
        "detail": None,
        "models": {"double": {"state": "ready", "version": "1", "provider": "cpu"}},
    }
    assert service.predict("double", x=4).json()["prediction"] == {"y": 8}


def test_a_stop_while_loading_is_quick_and_clean(start: Start, tmp_path: Path, pipe: Path) -> None:
    slow = PREDICTOR.replace("self.factor = ", f"Path({str(pipe)!r}).read_text(); self.factor = ")
    service = start(PREDICTORS_DIR=predictors(tmp_path, double=slow)).wait_for("/health")
    service.signal(15)
    assert service.exit_code() == 0
    assert service.log_lines("stopped")


def test_the_newest_version_is_served(start: Start, tmp_path: Path) -> None:
    for version in range(1, 11):
        publish(tmp_path, "double", factor_txt=str(version).encode())
    service = start(PREDICTORS_DIR=predictors(tmp_path, double=PREDICTOR), ARTIFACTS_DIR=tmp_path)
    answer = service.wait_for("/ready").predict("double", x=1).json()
    assert answer["model_version"] == "10"
    assert answer["prediction"] == {"y": 10}
    versions = service.client.get("/v1/models/double").json()["versions"]
    assert versions[0] == {"version": "1", "state": "available"}
    assert versions[-1] == {"version": "10", "state": "ready"}


class TestRefusal:
    """Each names the model, the file, and what to do."""

    def test_no_artifact(self, start: Start, tmp_path: Path) -> None:
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert f"double: there is no {tmp_path}/double/1/" in line
        assert "python -m training.double" in line

    def test_no_manifest(self, start: Start, tmp_path: Path) -> None:
        (publish(tmp_path, "double", factor_txt=b"2") / "manifest.json").unlink()
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert f"double: {tmp_path}/double/1/manifest.json is missing; publish" in line

    def test_a_manifest_that_is_no_json(self, start: Start, tmp_path: Path) -> None:
        (publish(tmp_path, "double", factor_txt=b"2") / "manifest.json").write_text("{]")
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert f"double: {tmp_path}/double/1/manifest.json: JSON: Invalid JSON" in line

    def test_a_file_that_was_altered(self, start: Start, tmp_path: Path) -> None:
        (publish(tmp_path, "double", factor_txt=b"2") / "factor.txt").write_text("3")
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert f"double: {tmp_path}/double/1/factor.txt is not the file that was published" in line

    def test_a_file_that_is_missing(self, start: Start, tmp_path: Path) -> None:
        (publish(tmp_path, "double", factor_txt=b"2") / "factor.txt").unlink()
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert f"double: {tmp_path}/double/1/factor.txt is missing; publish" in line

    def test_a_file_that_was_never_published(self, start: Start, tmp_path: Path) -> None:
        (publish(tmp_path, "double", factor_txt=b"2") / "extra.bin").write_bytes(b"")
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert f"double: {tmp_path}/double/1/extra.bin is not listed in manifest.json" in line

    def test_files_that_change_while_they_are_loaded(self, start: Start, tmp_path: Path) -> None:
        publish(tmp_path, "double", factor_txt=b"2")
        reads = '(artifact_dir / "factor.txt").read_text()'
        assert reads in PREDICTOR
        writes = PREDICTOR.replace(reads, f'({reads}, (artifact_dir / "factor.txt").touch())[0]')
        folder = predictors(tmp_path, double=writes)
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=folder))
        assert f"double: the files in {tmp_path}/double/1 changed while they were loaded" in line

    def test_a_corrupt_model(self, start: Start, tmp_path: Path) -> None:
        publish(tmp_path, "double", factor_txt=b"no number")
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert f"double: cannot load {tmp_path}/double/1/factor.txt: ValueError:" in line
        assert "(double.py, line 25)" in line
        assert "train it again or mend the predictor" in line

    def test_a_file_that_cannot_be_read(self, start: Start, tmp_path: Path) -> None:
        manifest = publish(tmp_path, "double", factor_txt=b"2") / "manifest.json"
        manifest.unlink()
        manifest.mkdir()
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path)))
        assert line == (
            f"double: {manifest} cannot be read (Is a directory); let the service's user read it"
        )

    def test_a_model_that_does_not_fit_the_example(self, start: Start, tmp_path: Path) -> None:
        source = PREDICTOR.replace("for row in batch]", "for row in batch[1:]]")
        publish(tmp_path, "double", factor_txt=b"2")
        line = refusal(
            start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=predictors(tmp_path, double=source))
        )
        assert f"double: {tmp_path}/double/1/factor.txt does not fit double.py" in line
        assert "0 predictions for 1 rows" in line

    def test_no_gpu_where_one_is_demanded(self, start: Start, tmp_path: Path) -> None:
        line = refusal(start(DEVICE="cuda", PREDICTORS_DIR=_only_double(tmp_path)))
        assert line.startswith("double: DEVICE=cuda, but this model runs on the CPU; set DEVICE=")

    @pytest.mark.parametrize(
        ("source", "complaint"),
        [
            ("import nonesuch", "cannot be imported: ModuleNotFoundError: No module named"),
            ("def broken(:", "cannot be imported: SyntaxError"),
            ("x = 1", "expected one class Predictor(BasePredictor[Features, Prediction]), found 0"),
            (PREDICTOR.replace("    example = ", "    sample = "), "give Predictor a class"),
            (PREDICTOR.replace('"x": 21', '"x": "21"'), "cannot be imported: ValidationError"),
            (PREDICTOR.replace("def predict(", "def score("), "Predictor has no predict"),
            (
                PREDICTOR.replace("[Features, Prediction]", ""),
                "derive Predictor from BasePredictor[",
            ),
            (
                PREDICTOR.replace("Features(BaseFeatures)", "Features(BaseModel)").replace(
                    "from app", "from pydantic import BaseModel\nfrom app"
                ),
                "derive Features from BaseFeatures",
            ),
            (
                PREDICTOR.replace(
                    "class Features(BaseFeatures):\n",
                    "class Place(BaseModel):\n    lat: float\n\n\n"
                    "class Features(BaseFeatures):\n    where: list[Place] | None = None\n",
                ).replace("from app", "from pydantic import BaseModel\nfrom app"),
                "derive Place from BaseFeatures, as Features holds it",
            ),
        ],
    )
    def test_a_predictor_file_that_breaks_the_contract(
        self, tmp_path: Path, source: str, complaint: str
    ) -> None:
        folder = predictors(tmp_path, double=source)
        with pytest.raises(StartupError) as caught:
            discover(folder)
        line = str(caught.value)
        assert line.startswith(f"{folder}/double.py")
        assert complaint in line
        assert "\n" not in line

    def test_a_predictor_file_with_a_typing_error(self, start: Start, tmp_path: Path) -> None:
        line = refusal(start(PREDICTORS_DIR=predictors(tmp_path, double="def broken(:")))
        assert line.startswith(f"{tmp_path}/predictors/double.py cannot be imported: SyntaxError")

    def test_a_quick_model_that_takes_one_row(self, start: Start, tmp_path: Path) -> None:
        source = PREDICTOR.replace("return [", "[_] = batch\n        return [", 1)
        assert source != PREDICTOR
        publish(tmp_path, "double", factor_txt=b"2")
        folder = predictors(tmp_path, double=source)
        line = refusal(start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=folder))
        assert line.startswith("double: predict of 32 rows, each the example, failed: ValueError")
        assert "(double.py, line " in line
        assert line.endswith("set batch_max_rows = 1 in it")

    def test_a_default_model_that_does_not_exist(self, start: Start) -> None:
        line = refusal(start(DEFAULT_MODEL="triple"))
        assert "DEFAULT_MODEL=triple: there is no" in line
        assert "choose of: double, faulty, gate" in line

    def test_no_predictor_at_all(self, start: Start, tmp_path: Path) -> None:
        assert "No predictor in" in refusal(start(PREDICTORS_DIR=tmp_path))

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            ({"PORT": "http"}, "PORT: Input should be a valid integer"),
            ({"WEB_CONCURRENCY": "none"}, "WEB_CONCURRENCY: Input should be a valid integer"),
            ({"WEB_CONCURRENCY": "1000"}, "WEB_CONCURRENCY: Input should be less than or equal to"),
        ],
    )
    def test_an_invalid_setting_of_gunicorn(
        self, start: Start, settings: dict[str, str], complaint: str
    ) -> None:
        service = start(**settings, API_KEYS_SHA256="s3cret")
        assert service.exit_code() == 1
        [line] = service.log.splitlines()
        assert line.startswith("Invalid settings: ")
        assert complaint in line
        assert "API_KEYS_SHA256: Value error, each key is given as" in line
        assert "s3cret" not in line

    def test_an_invalid_setting_of_the_workers(self, start: Start) -> None:
        service = start(API_KEYS_SHA256="s3cret")
        line = refusal(service)
        assert line.startswith("Invalid settings: API_KEYS_SHA256: Value error, each key is given")
        assert "s3cret" not in service.log


def _only_double(directory: Path) -> Path:
    return predictors(directory, double=PREDICTOR)


def test_the_traceback_of_a_failed_load_is_there_on_demand(start: Start, tmp_path: Path) -> None:
    publish(tmp_path, "double", factor_txt=b"no number")
    service = start(
        ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path), LOG_LEVEL="debug"
    )
    assert service.exit_code() != 0
    [line] = service.log_lines("double: load failed")
    assert line["exception"][0]["exc_type"] == "ValueError"


def test_a_change_of_the_fields_since_training_is_told(start: Start, tmp_path: Path) -> None:
    schema: dict[str, Any] = {"properties": {"x": {}, "note": {}, "size": {}}}
    with new_version(tmp_path, "double", input_schema=schema) as directory:
        (directory / "factor.txt").write_text("2")
    service = start(ARTIFACTS_DIR=tmp_path, PREDICTORS_DIR=_only_double(tmp_path))
    service.wait_for("/ready")
    [line] = [line for line in service.log_lines() if line["level"] == "warning"]
    assert line["event"].endswith("since version 1 was published: class, size")


def test_artifacts_are_read_through_links(start: Start, tmp_path: Path) -> None:
    # Kubernetes mounts volumes as links.
    version = publish(tmp_path / "real", "double", factor_txt=b"5")
    (tmp_path / "mounted" / "double").mkdir(parents=True)
    (tmp_path / "mounted" / "double" / "1").symlink_to(version)
    service = start(ARTIFACTS_DIR=tmp_path / "mounted", PREDICTORS_DIR=_only_double(tmp_path))
    assert service.wait_for("/ready").predict("double", x=1).json()["prediction"] == {"y": 5}


def test_a_predictor_is_known_by_what_was_run(tmp_path: Path) -> None:
    # Whatever is in its file by the time that somebody asks.
    replaced = PREDICTOR + "\n(Path(__file__)).write_text('other')\n"
    path = predictors(tmp_path, changing=replaced) / "changing.py"
    module = sys.modules[discover(path.parent)["changing"].__module__]
    assert path.read_text() == "other"
    assert vars(module)[SOURCE_SHA256] == hashlib.sha256(replaced.encode()).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        {"title": "another"},
        {"name": "twice"},
        {"contents": (b"2", b"2")},
        {"contents": (b"3",)},
        {"source": ("self.factor *", "self.factor  *")},
        {"source": ("x: float", "x: float\n    y: float = 1")},
    ],
)
def test_what_answers_depend_on_is_all_in_the_identity(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    def identity(
        place: str,
        title: str = "service",
        name: str = "double",
        contents: tuple[bytes, ...] = (b"2",),
        source: tuple[str, str] = ("", ""),
    ) -> tuple[str, ...]:
        (tmp_path / place).mkdir()
        folder = predictors(tmp_path / place, **{name: PREDICTOR.replace(*source)})
        for content in contents:
            publish(tmp_path / place, name, factor_txt=content)
        settings = Settings(
            predictors_dir=folder,
            artifacts_dir=tmp_path / place,
            default_model=name,
            service_title=title,
            cache_enabled=False,
        )
        artifact = artifacts.newest(tmp_path / place, name)
        return ModelRepository(settings).get(name)._identity(artifact)

    assert identity("one") == identity("same")
    assert identity("one more") != identity("other", **changed)


def test_as_many_connections_may_be_open_as_the_system_allows(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        service = start().wait_for("/ready")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


PAGE_FAULTS = """
from resource import RUSAGE_SELF, getrusage
from app.serving import settle_in

if {is_kept}:
    settle_in()
# By default glibc keeps twice as much as the largest block that was freed before.
for _ in range({times}):
    images = [bytearray(1024 * 1024) for _ in range(40)]
    del images
print(getrusage(RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(not hasattr(CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_was_freed_is_used_again() -> None:
    def page_faults(*, is_kept: bool) -> int:
        def until(times: int) -> int:
            code = PAGE_FAULTS.format(is_kept=is_kept, times=times)
            command = [sys.executable, "-c", code]
            environment = {"PATH": os.environ["PATH"]}
            done = subprocess.run(
                command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
            )
            return int(done.stdout)

        return until(20) - until(5)

    assert page_faults(is_kept=True) < page_faults(is_kept=False) / 10


def python(code: str) -> "subprocess.CompletedProcess[str]":
    """Runs it in the service's folder, with the settings of a service that starts."""
    settings = {"PREDICTORS_DIR": str(FAKES), "DEFAULT_MODEL": "double", "LOG_FORMAT": "json"}
    return subprocess.run(
        [sys.executable, "-c", f"import os, sys\n{code}"],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"]} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


class TestImports:
    def test_gunicorns_own_process_has_none_of_the_large_packages(self) -> None:
        large = {"asyncio", "ctypes", "fastapi", "multiprocessing", "opentelemetry", "pydantic"}
        ran = python(f"""
os.environ.update(PORT="8081", SHUTDOWN_GRACE_S="20", LOG_LEVEL="INFO")
import logging.config, runpy
import gunicorn.app.wsgiapp, app.worker
settings = runpy.run_path("gunicorn.conf.py")
logging.config.dictConfig(settings["logconfig_dict"])
logging.getLogger("gunicorn.error").info("Listening at: %s", settings["bind"])
print({large | {"structlog", "uvicorn"}} & sys.modules.keys())
""")
        assert "Listening at" in ran.stderr
        assert ran.stdout == "set()\n", ran.stderr

    def test_a_worker_has_structlog_before_there_is_trouble_to_tell_of(self) -> None:
        code = "import app.worker, app.serving; print('structlog' in sys.modules)"
        assert python(code).stdout == "True\n"

    def test_opentelemetry_is_for_those_who_want_traces(self) -> None:
        code = "from app.main import create_app; create_app(); print('app.tracing' in sys.modules)"
        assert python(code).stdout == "False\n"
        endpoint = "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:1'"
        assert python(f"{endpoint}\n{code}").stdout == "True\n"
