"""The image: built from the real Dockerfile, looked into, and run as a locked-down cluster does."""

import json
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from tests.conftest import BakedProject, make_project
from tests.containers import Container, Containers
from tests.test_baked_projects import free_port

WAIT_S = 60
SECRET = "swordfish"  # noqa: S105
PLANTED = [
    ".env",
    "notes.txt",
    "data/customers.csv",
    "app/id_rsa",
    "app/.env",
    "app/api/token",
    "app/status.html",
    "app/api/status.txt",
    "predictors/credentials.json",
    "predictors/.netrc",
    "artifacts/password",
    "artifacts/fraud/password",
    "artifacts/fraud/2-old/password",
    "artifacts/fraud/copy of 2/password",
    "requirements/pip.conf",
]

NOT_IMPORTED = {
    "pysimdjson",  # By services whose features are arrays.
    # By their metadata, parts of packages need these that no service uses.
    "flatbuffers",
    "h11",
    "packaging",
}


@pytest.fixture(scope="module")
def project(
    template: Path, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> BakedProject:
    """With a model in two versions, and with secrets wherever somebody may leave them."""
    folder = tmp_path_factory.mktemp("image")
    project = make_project(template, folder, project_name="Image Test")
    project.run("git", "init", "--quiet")
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    project.run("git", *who, "commit", "--quiet", "--allow-empty", "--message", "A commit")
    shutil.copytree(artifacts, project.path / "artifacts")
    project.run("python", "-m", "training.fraud")
    for name in PLANTED:
        path = project.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRET)
    return project


@pytest.fixture(scope="module")
def image(project: BakedProject, containers: Containers) -> str:
    given = containers.engine() | {"IMAGE": "localhost/image-test", "TAG": "1.2.3"}
    project.run("make", "image", *(f"{name}={value}" for name, value in given.items()))
    return "localhost/image-test:1.2.3"


class Service:
    """What is served by a container, on a port of this machine."""

    def __init__(self, container: Container, port: int) -> None:
        self.container = container
        self.port = port

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return json.load(answer)

    def wait(self) -> "Service":
        deadline = monotonic() + WAIT_S
        while True:
            try:
                self.get("/ready")
            except OSError:
                assert monotonic() < deadline, self.container.log
                sleep(0.1)
            else:
                return self


@contextmanager
def serving(
    containers: Containers, image: str, *options: str, **environment: str
) -> Iterator[Service]:
    port = free_port()
    environment |= {"PORT": str(port), "BIND_ADDRESS": "127.0.0.1"}
    with containers.running(image, *options, **environment) as container:
        yield Service(container, port).wait()


def test_it_holds_the_service_and_the_newest_model_and_no_secret(
    containers: Containers, image: str
) -> None:
    with containers.files(image) as root:
        files = {path for path in (root / "srv").rglob("*") if path.is_file()}
        assert {path.suffix for path in files if "artifacts" not in path.parts} == {
            ".py",
            ".pyc",
            ".toml",
            ".html",
            ".css",
            ".js",
        }
        names = {path.relative_to(root / "srv").as_posix() for path in files}
        models = sorted(name for name in names if name.startswith("artifacts/"))
        parts = ("manifest.json", "model.onnx", "reference.json")
        assert models == [f"artifacts/fraud/2/{name}" for name in parts]
        assert not any(SECRET.encode() in path.read_bytes() for path in files)
        assert not (root / "etc/pip.conf").exists()
        assert not list((root / "opt/venv").rglob("site-packages/pip"))
        assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_it_says_what_it_is(project: BakedProject, containers: Containers, image: str) -> None:
    revision = project.run("git", "rev-parse", "HEAD").strip()
    [about] = json.loads(containers.podman("image", "inspect", image))
    assert about["Config"]["User"] == "10001:10001"
    assert about["Labels"].items() >= {
        ("org.opencontainers.image.title", "image-test"),
        ("org.opencontainers.image.revision", revision),
        ("org.opencontainers.image.version", "1.2.3"),
    }


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def test_it_is_hardly_larger_than_what_it_is_made_of(
    project: BakedProject, containers: Containers, image: str
) -> None:
    [base] = re.findall(r"ARG PYTHON_IMAGE=(\S+)", project.read("Dockerfile"))
    with containers.files(base) as root:
        of_base = size(root)
    with containers.files(image) as root:
        whole = size(root)
        [packages] = (root / "opt/venv/lib").glob("python*/site-packages")
        of_wheels = sum(
            file.size or 0
            for distribution in distributions(path=[str(packages)])
            for file in distribution.files or []
        )
    assert whole < 1.15 * (of_base + of_wheels)


def test_the_service_imports_all_that_is_installed(containers: Containers, image: str) -> None:
    with containers.files(image) as root:
        [packages] = (root / "opt/venv/lib").glob("python*/site-packages")
        modules = {
            found.name: {Path(file).parts[0].partition(".")[0] for file in found.files or []}
            for found in distributions(path=[str(packages)])
        }
    # Nobody listens there, which is no reason not to start.
    environment = {
        "PYTHONPROFILEIMPORTTIME": "1",
        "REDIS_URL": "redis://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
    }
    with serving(containers, image, **environment) as service:
        ask(service.port)
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/"):
            pass
        log = service.container.log
    imported = set(re.findall(r"^import time:[\d |]+ (\w+)", log, re.MULTILINE))
    unused = {name for name, of_it in modules.items() if not of_it & imported}
    assert unused == NOT_IMPORTED


def test_it_runs_with_nothing_to_write_to_and_no_rights(containers: Containers, image: str) -> None:
    with serving(containers, image) as service:
        container = service.container
        status = container.execute("cat", "/proc/1/status")
        assert re.search(r"^Uid:\t10001\t10001\t", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        container.execute("python", "app/healthcheck.py")
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/") as page:
            assert b"<h1>Image Test</h1>" in page.read()
        for path in ("/health", "/startup", "/ready"):
            service.get(path)
        assert service.get("/v1/models")["models"][0]["version"] == "2"
        assert "prediction" in json.loads(ask(service.port).partition(b"\r\n\r\n")[2])


EXAMPLE = (
    b'{"features": {"transaction_amount": 1250.0, "merchant_category": "electronics", '
    b'"user_account_age_days": 12, "hour_of_day": 3}}'
)


def ask(port: int) -> bytes:
    with begin_to_ask(port) as connection:
        connection.sendall(EXAMPLE[10:])
        return read_all(connection)


def begin_to_ask(port: int) -> socket.socket:
    """A request whose body is there in part."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    connection.sendall(
        b"POST /v1/predict HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(EXAMPLE)
        + EXAMPLE[:10]
    )
    return connection


def read_all(connection: socket.socket) -> bytes:
    content = b""
    while more := connection.recv(65_536):
        content += more
    return content


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
    except OSError:
        return True
    return False


def test_a_stop_waits_for_work_in_flight(containers: Containers, image: str) -> None:
    with serving(containers, image) as service, begin_to_ask(service.port) as connection:
        service.container.signal("TERM")
        deadline = monotonic() + WAIT_S
        while not refuses_connections(service.port):
            assert monotonic() < deadline
            sleep(0.05)
        connection.sendall(EXAMPLE[10:])
        assert read_all(connection).startswith(b"HTTP/1.1 200")
        assert service.container.exit_code() == 0


def test_a_model_can_be_mounted(project: BakedProject, containers: Containers) -> None:
    image = containers.build(project.path, "cpu-without-model")
    with containers.running(image) as container:
        assert container.exit_code() != 0
        last = json.loads(container.log.splitlines()[-1])
    assert last
    models = project.path / "artifacts/fraud"
    with serving(containers, image, "--volume", f"{models}:/srv/artifacts/fraud:ro"):
        pass


def test_without_a_model_it_says_what_to_do(project: BakedProject) -> None:
    copy = BakedProject(project.path.parent / "untrained")
    shutil.copytree(project.path, copy.path, ignore=shutil.ignore_patterns("artifacts"))
    done = subprocess.run(
        ["make", "image"], cwd=copy.path, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "make train" in done.stderr


def layers(containers: Containers, image: str) -> list[str]:
    [about] = json.loads(containers.podman("image", "inspect", image))
    found: list[str] = about["RootFS"]["Layers"]
    return found


def test_only_what_has_changed_is_sent_again(
    project: BakedProject, containers: Containers, image: str
) -> None:
    copy = BakedProject(project.path.parent / "changed")
    shutil.copytree(project.path, copy.path)
    before = layers(containers, containers.build(copy.path, "cpu"))
    assert before == layers(containers, image), "built again from the same files"
    copy.write("app/main.py", copy.read("app/main.py") + "\n# Changed.\n")
    new_code = layers(containers, containers.build(copy.path, "cpu"))
    assert sum(old != new for old, new in zip(before, new_code, strict=True)) == 1
    copy.run("python", "-m", "training.fraud")
    new_model = layers(containers, containers.build(copy.path, "cpu"))
    assert sum(old != new for old, new in zip(new_code, new_model, strict=True)) == 1
    assert new_model[:-1] == new_code[:-1]
    # Of packages the bytecode has the date of its source in it.
    anew = layers(containers, containers.build(project.path, "cpu", "--no-cache"))
    assert anew[-2:] == before[-2:], "code and model, wherever and whenever they are built"


@pytest.mark.usefixtures("image")
def test_make_runs_it_as_a_cluster_does(project: BakedProject, containers: Containers) -> None:
    given = containers.engine() | {"IMAGE": "localhost/image-test", "TAG": "1.2.3"}
    given |= {"PORT": str(port := free_port())}
    command = ["make", "run-image", *(f"{name}={value}" for name, value in given.items())]
    log = project.path.parent / "run-image.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=project.path, stdout=output, stderr=output)
    try:
        deadline = monotonic() + WAIT_S
        while b"200 OK" not in ask_if_there(port):
            assert process.poll() is None, log.read_text()
            assert monotonic() < deadline, log.read_text()
            sleep(0.1)
    finally:
        # It goes on to the container, whose first process is the service.
        containers.podman("stop", "--all")
        assert process.wait(WAIT_S) == 0, log.read_text()


def ask_if_there(port: int) -> bytes:
    try:
        return ask(port)
    except OSError:
        return b""


def test_the_tests_run_in_an_image(project: BakedProject, containers: Containers) -> None:
    image = containers.build(project.path, "test")
    with containers.running(
        image, "--tmpfs", "/srv/.hypothesis", command=["tests/test_fraud.py"]
    ) as container:
        assert container.exit_code() == 0, container.log
        assert " passed" in container.log
