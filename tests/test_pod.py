"""The rendered Deployment as podman plays it, and its probes as a kubelet asks them."""

import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import BakedProject, make_project
from tests.containers import Container, Containers
from tests.test_baked_projects import free_port
from tests.test_image import EXAMPLE, begin_to_ask, read_all, refuses_connections

Object = dict[str, Any]
WAIT_S = 60
ADDED_BY_PROMETHEUS = {"namespace", "app_kubernetes_io_name", "rollouts_pod_template_hash"}
"""Labels of pods, by the PodMonitor."""


@pytest.fixture(scope="module")
def project(
    template: Path, artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> BakedProject:
    folder = tmp_path_factory.mktemp("pod")
    project = make_project(template, folder, project_name="Pod Test")
    shutil.copytree(artifacts, project.path / "artifacts")
    return project


@pytest.fixture(scope="module")
def manifests(project: BakedProject, containers: Containers) -> list[Object]:
    """What podman plays of the overlay `dev`, with the image that there is here."""
    rendered = containers.kubectl("kustomize", project.path / "deploy/kubernetes/overlays/dev")
    objects = list(yaml.safe_load_all(rendered))
    [deployment] = [entry for entry in objects if entry["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    container["image"] = containers.build(project.path, "cpu")
    # There is no network here but the host's, where ports are not mapped.
    assert container.pop("ports") == [{"name": "http", "containerPort": 8080}]
    return [entry for entry in objects if entry["kind"] in ("Deployment", "ConfigMap")]


class Pod:
    def __init__(self, container: Container, port: int, spec: Object) -> None:
        self.container = container
        self.port = port
        self.grace_s: int = spec["terminationGracePeriodSeconds"]
        [self._spec] = spec["containers"]

    def probe(self, kind: str) -> int | None:
        """The status that a kubelet would see; None: there is no answer in its time."""
        probe = self._spec[f"{kind}Probe"]
        url = f"http://127.0.0.1:{self.port}{probe['httpGet']['path']}"
        try:
            with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as answer:
                status: int = answer.status
        except HTTPError as error:
            status = error.code
        except OSError:
            return None
        return status

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = monotonic() + WAIT_S
        while not condition():
            assert monotonic() < deadline, self.container.log
            sleep(0.05)


@pytest.fixture
def play(manifests: list[Object], containers: Containers, tmp_path: Path) -> Callable[..., Any]:
    """Plays the Deployment; with `predictor` in place of that of the image."""

    @contextmanager
    def play(predictor: str | None = None) -> Iterator[Pod]:
        deployment, settings = (
            yaml.safe_load(yaml.safe_dump(entry))
            for entry in sorted(manifests, key=lambda entry: entry["kind"], reverse=True)
        )
        port = free_port()
        settings["data"] |= {"PORT": str(port), "BIND_ADDRESS": "127.0.0.1"}
        pod = deployment["spec"]["template"]["spec"]
        [container] = pod["containers"]
        if predictor:
            (tmp_path / "predictors").mkdir()
            (tmp_path / "predictors/fraud.py").write_text(predictor)
            source = {"path": str(tmp_path / "predictors"), "type": "Directory"}
            pod["volumes"].append({"name": "predictors", "hostPath": source})
            mount = {"name": "predictors", "mountPath": "/srv/predictors", "readOnly": True}
            container["volumeMounts"].append(mount)
        file = tmp_path / "pod.yaml"
        file.write_text(yaml.safe_dump_all([settings, deployment]))
        with containers.playing(file, "pod-test") as played:
            yield Pod(played, port, pod)

    return play


def test_it_starts_and_all_probes_say_so(play: Callable[..., Any]) -> None:
    with play() as pod:
        pod.wait(lambda: pod.probe("startup") == 200)
        assert pod.probe("liveness") == 200
        assert pod.probe("readiness") == 200
        assert begin_and_end_to_ask(pod).startswith(b"HTTP/1.1 200")
        status = pod.container.execute("cat", "/proc/1/status")
        assert "Uid:\t10001\t10001\t" in status


def test_queries_ask_for_metrics_that_there_are(
    project: BakedProject, play: Callable[..., Any]
) -> None:
    queries = "\n".join(
        line
        for name in ("autoscale-keda/scaledobject.yaml", "rollouts/analysistemplate.yaml")
        for line in project.read(f"deploy/kubernetes/components/{name}").splitlines()
        if not line.lstrip().startswith("#")
    )
    asked = {
        name: set(re.findall(r"(\w+)[=!]", labels))
        for name, labels in re.findall(r"(\w+)\{([^}\n]*(?:\{\{.*?\}\}[^}\n]*)*)\}", queries)
    }
    assert len(asked) == 4
    with play() as pod:
        pod.wait(lambda: pod.probe("readiness") == 200)
        begin_and_end_to_ask(pod)
        with urllib.request.urlopen(f"http://127.0.0.1:{pod.port}/metrics") as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    has = {sample.name: {*sample.labels} | ADDED_BY_PROMETHEUS for sample in samples}
    for name, labels in asked.items():
        assert labels <= has.get(name, ADDED_BY_PROMETHEUS if name == "up" else set()), name


def begin_and_end_to_ask(pod: Pod) -> bytes:
    with begin_to_ask(pod.port) as connection:
        connection.sendall(EXAMPLE[10:])
        return read_all(connection)


def predictor_that(project: BakedProject, statement: str) -> str:
    """Does `statement` before it loads."""
    source = project.read("predictors/fraud.py")
    head = "    def load(self, artifact_dir: Path, device: Device) -> None:\n"
    assert head in source
    return source.replace(head, f"{head}        {statement}\n")


def test_while_a_model_loads_it_lives_and_is_not_ready(
    project: BakedProject, play: Callable[..., Any]
) -> None:
    # Loading goes on when the directory is there; nothing else can be written to.
    statement = "import time\n        while not Path('/tmp/go').is_dir(): time.sleep(0.05)"
    with play(predictor_that(project, statement)) as pod:
        pod.wait(lambda: pod.probe("liveness") == 200)
        assert pod.probe("startup") == 503
        assert pod.probe("readiness") == 503
        pod.container.execute("mkdir", "/tmp/go")  # noqa: S108
        pod.wait(lambda: pod.probe("startup") == 200)
        assert pod.probe("readiness") == 200


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(
    project: BakedProject, play: Callable[..., Any]
) -> None:
    with play(predictor_that(project, "raise OSError('no such weights')")) as pod:
        pod.wait(lambda: pod.container.restarts > 0)
        assert "no such weights" in pod.container.log
        assert pod.probe("startup") != 200


def test_a_drain_answers_what_was_begun(play: Callable[..., Any]) -> None:
    with play() as pod, ThreadPoolExecutor() as pool:
        pod.wait(lambda: pod.probe("readiness") == 200)
        with begin_to_ask(pod.port) as connection:
            stopping = pool.submit(pod.container.stop, pod.grace_s)
            pod.wait(lambda: refuses_connections(pod.port))
            connection.sendall(EXAMPLE[10:])
            assert read_all(connection).startswith(b"HTTP/1.1 200")
        stopping.result()
        assert pod.container.exit_code() == 0
