"""The manifests: rendered, valid in the last minors of Kubernetes, and in step with the service."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.conftest import REPOSITORY, TEMPLATE, BakedProject, make_project
from tests.containers import Containers, run
from tests.kustomizations import Object, Rendered, distinct, render
from tests.network_policies import accepts, may_call

MINORS = ("1.34", "1.35", "1.36", "1.37")
OVERLAYS = ["dev", "staging", "production", "production-gpu"]
TO_END_S = 5
"""What a service takes to end beside what it waits for."""

MODELS = {
    "argoproj.io": "argo-rollouts",
    "gateway.networking.k8s.io": "gateway-api",
    "keda.sh": "keda",
    "monitoring.coreos.com": "prometheus-operator",
}
"""By the group of a custom resource: the package of @kubernetes-models that has its schema."""

ACCEPTED = {
    "CKV_K8S_15": "Always asking for the image: no tag is given twice, a laptop has no registry",
    "CKV_K8S_35": "Secrets as environment: the service's settings are; keys are digests there",
    "CKV_K8S_43": "Images by digest: for a release pipeline, which knows it",
}
"""What the policy scan has against them, and why it stays."""

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: none, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: none, context: {cluster: none, user: none}}]
users: [{name: none, user: {token: none}}]
current-context: none
"""


@pytest.fixture(scope="module")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory) -> BakedProject:
    folder = tmp_path_factory.mktemp("kubernetes")
    return make_project(template, folder, project_name="Image Test")


@pytest.fixture(scope="module")
def rendered(project: BakedProject, containers: Containers) -> Rendered:
    return render(containers, project.path / "deploy/kubernetes")


def is_custom(entry: Object) -> bool:
    return entry["apiVersion"].partition("/")[0] in MODELS


@pytest.fixture(scope="module")
def upload(project: BakedProject) -> Object:
    """What is applied by itself."""
    path = "deploy/kubernetes/components/model-volume/upload.yaml"
    pod: Object = yaml.safe_load(project.read(path))
    return pod


@pytest.mark.parametrize("minor", MINORS)
def test_they_are_valid(rendered: Rendered, upload: Object, minor: str) -> None:
    for entry in [*distinct(rendered), upload]:
        if not is_custom(entry):
            kubernetes_validate.validate(entry, minor, strict=True)


@pytest.fixture
def custom_resources(tmp_path: Path) -> Path:
    """A folder with the types of the custom resources, and a compiler for them."""
    if not shutil.which("npm"):
        pytest.skip("custom resources are not checked without npm")
    folder = tmp_path / "custom_resources"
    shutil.copytree(REPOSITORY / "tests/custom_resources", folder)
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", folder=folder)
    return folder


def check_custom(folder: Path, objects: list[Object]) -> subprocess.CompletedProcess[str]:
    """The types refuse what is not in a schema, the validators values that it does not allow."""
    lines = []
    for number, entry in enumerate(objects):
        kind, package = entry["kind"], MODELS[entry["apiVersion"].partition("/")[0]]
        module = f"@kubernetes-models/{package}/{entry['apiVersion']}/{kind}"
        lines += [
            f'import {{ {kind} as Kind{number}, type I{kind} as Type{number} }} from "{module}";',
            f"const object{number}: Type{number} = {json.dumps(entry)};",
            f"new Kind{number}(object{number}).validate();",
        ]
    (folder / "objects.ts").write_text("\n".join(lines))
    command = "node_modules/.bin/tsc --project . && node objects.js"
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=False
    )


def test_custom_resources_are_valid(rendered: Rendered, custom_resources: Path) -> None:
    objects = [entry for entry in distinct(rendered) if is_custom(entry)]
    kinds = {"PodMonitor", "PrometheusRule", "ScaledObject"}
    kinds |= {"HTTPRoute", "Rollout", "AnalysisTemplate"}
    assert {entry["kind"] for entry in objects} == kinds
    done = check_custom(custom_resources, objects)
    assert done.returncode == 0, done.stdout + done.stderr
    # That it can tell: a name that is none, and a value that is none.
    route = of_kind(objects, "HTTPRoute")[0]
    changes: list[Object] = [{"rule": []}, {"rules": [{"timeouts": {"request": "soon"}}]}]
    for change in changes:
        spoilt = route | {"spec": route["spec"] | change}
        assert check_custom(custom_resources, [spoilt]).returncode != 0, change


def test_a_policy_scan_has_nothing_against_them_but_this(
    rendered: Rendered, tmp_path: Path
) -> None:
    run("uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    lock = REPOSITORY / "requirements/policy.lock"
    run("uv", "pip", "sync", "--quiet", "--python", tmp_path / "venv/bin/python", lock)
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for number, entry in enumerate(distinct(rendered)):
        (manifests / f"{number}.yaml").write_text(yaml.safe_dump(entry))
    scan = ["--framework", "kubernetes", "--skip-download", "--quiet", "--output", "json"]
    checkov = tmp_path / "venv/bin/checkov"
    found = json.loads(run(checkov, "--directory", manifests, *scan, check=False))
    assert found["summary"]["passed"] > 0
    assert found["summary"]["parsing_errors"] == 0
    failed = {check["check_id"]: check["check_name"] for check in found["results"]["failed_checks"]}
    assert failed.keys() == ACCEPTED.keys(), failed


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [entry for entry in objects if entry["kind"] in kinds]


def names(objects: list[Object], kind: str) -> set[str]:
    return {entry["metadata"]["name"] for entry in of_kind(objects, kind)}


def selected(objects: list[Object], labels: dict[str, str]) -> set[str]:
    """The Deployments whose pods have these labels."""
    return {
        entry["metadata"]["name"]
        for entry in of_kind(objects, "Deployment")
        if labels.items() <= entry["spec"]["template"]["metadata"]["labels"].items()
    }


def test_selectors_find_the_pods_that_are_meant_and_no_others(rendered: Rendered) -> None:
    for name, objects in rendered.items():
        services = names(objects, "Deployment") - {"image-test-redis"}
        for entry in of_kind(objects, "Deployment", "PodDisruptionBudget"):
            own = entry["metadata"]["name"]
            assert selected(objects, entry["spec"]["selector"]["matchLabels"]) == {own}, name
        for entry in of_kind(objects, "Service"):
            own = entry["metadata"]["name"]
            assert selected(objects, entry["spec"]["selector"]) == {own}, name
        for entry in of_kind(objects, "PodMonitor"):
            assert selected(objects, entry["spec"]["selector"]["matchLabels"]) == services, name
        for entry in of_kind(objects, "NetworkPolicy"):
            about = (
                {"image-test-redis"}
                if entry["metadata"]["name"] == "image-test-redis"
                else services
            )
            assert selected(objects, entry["spec"]["podSelector"]["matchLabels"]) == about, name


def references(entry: Object) -> Iterator[tuple[str, str]]:
    """What `entry` says is there: kind and name."""
    spec = entry.get("spec", {})
    for key in ("scaleTargetRef", "workloadRef"):
        if key in spec:
            yield spec[key].get("kind", "Deployment"), spec[key]["name"]
    if entry["kind"] == "Deployment":
        yield from references_of_pod(spec["template"]["spec"])
    if entry["kind"] == "HTTPRoute":
        for backend in chain.from_iterable(rule["backendRefs"] for rule in spec["rules"]):
            yield "Service", backend["name"]
    if entry["kind"] == "Rollout":
        for template in spec["strategy"]["canary"]["analysis"]["templates"]:
            yield "AnalysisTemplate", template["templateName"]


def references_of_pod(pod: Object) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pod["serviceAccountName"]
    for volume in pod.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    [container] = pod["containers"]
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            yield "ConfigMap", source["configMapRef"]["name"]
    for variable in container.get("env", []):
        for address in re.findall("//(.*):", variable["value"]):
            yield "Service", address


def containers_of(objects: list[Object], labels: dict[str, str]) -> list[Object]:
    """Those of the pods with these labels."""
    pods = [entry["spec"]["template"] for entry in of_kind(objects, "Deployment")]
    return [
        pod["spec"]["containers"][0]
        for pod in pods
        if labels.items() <= pod["metadata"]["labels"].items()
    ]


def named_ports(entry: Object) -> Iterator[tuple[dict[str, str], str]]:
    """The pods, and the port of theirs, that `entry` names."""
    spec = entry.get("spec", {})
    if entry["kind"] == "Service":
        yield from ((spec["selector"], port["targetPort"]) for port in spec["ports"])
    if entry["kind"] == "PodMonitor":
        labels = spec["selector"]["matchLabels"]
        yield from ((labels, endpoint["port"]) for endpoint in spec["podMetricsEndpoints"])
    if entry["kind"] == "NetworkPolicy":
        labels = spec["podSelector"]["matchLabels"]
        ports = chain.from_iterable(rule["ports"] for rule in spec.get("ingress", []))
        yield from ((labels, port["port"]) for port in ports)
    if entry["kind"] == "Deployment":
        [container] = spec["template"]["spec"]["containers"]
        probes = [value for key, value in container.items() if key.endswith("Probe")]
        ways = [probe.get("httpGet") or probe["tcpSocket"] for probe in probes]
        yield from ((spec["selector"]["matchLabels"], way["port"]) for way in ways)


def test_ports_have_the_names_that_they_are_called_by(rendered: Rendered) -> None:
    for name, objects in rendered.items():
        for labels, port in chain.from_iterable(map(named_ports, objects)):
            for container in containers_of(objects, labels):
                assert port in {entry["name"] for entry in container["ports"]}, name
        services = {entry["metadata"]["name"]: entry for entry in of_kind(objects, "Service")}
        for route in of_kind(objects, "HTTPRoute"):
            for backend in route["spec"]["rules"][0]["backendRefs"]:
                ports = services[backend["name"]]["spec"]["ports"]
                assert backend["port"] in {port["port"] for port in ports}, name


SERVICE = {"app.kubernetes.io/part-of": "image-test"}
REDIS = {"app.kubernetes.io/name": "image-test-redis"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
CALLERS = {"allowed-to-call/image-test": "true"}


def test_who_may_connect_to_whom(rendered: Rendered) -> None:
    for name, objects in rendered.items():
        policies = of_kind(objects, "NetworkPolicy")
        has_redis = "image-test-redis" in names(objects, "Deployment")
        is_scraped = bool(of_kind(objects, "PodMonitor"))
        assert may_call(policies, SERVICE, REDIS, 6379) == has_redis, name
        assert not may_call(policies, SERVICE, {}, 6379), name
        assert accepts(policies, SERVICE, "http", pod={}), name
        assert accepts(policies, SERVICE, "http", namespace=CALLERS), name
        assert accepts(policies, SERVICE, "http", namespace=MONITORING) == is_scraped, name
        assert not accepts(policies, SERVICE, "http", namespace={}), name
        assert may_call(policies, SERVICE, {}, 4318, namespace=MONITORING) == is_scraped, name
        assert not may_call(policies, SERVICE, {}, 4318, namespace={}), name
        if has_redis:
            assert accepts(policies, REDIS, "redis", pod=SERVICE), name
            assert not accepts(policies, REDIS, "redis", pod={}), name
            assert not accepts(policies, REDIS, "redis", namespace=CALLERS), name


def deciders(objects: list[Object], release: Object) -> list[str]:
    """What says how many pods `release` has."""
    own = ("Deployment", release["metadata"]["name"])
    rollouts = of_kind(objects, "Rollout")
    followers = [entry for entry in rollouts if entry["spec"]["workloadRef"]["name"] == own[1]]
    targets = {own, *(("Rollout", entry["metadata"]["name"]) for entry in followers)}
    scalers = [
        entry["kind"]
        for entry in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
        if (
            entry["spec"]["scaleTargetRef"].get("kind", "Deployment"),
            entry["spec"]["scaleTargetRef"]["name"],
        )
        in (targets - {own} if followers else targets)
    ]
    fixed = [entry["kind"] for entry in [release, *followers] if "replicas" in entry["spec"]]
    return scalers + fixed


def test_one_alone_decides_how_many_there_are(rendered: Rendered) -> None:
    for name, objects in rendered.items():
        for release in of_kind(objects, "Deployment"):
            # This overlay says itself how many, and its page when not to.
            if not name.startswith("dev-with-"):
                assert len(deciders(objects, release)) == 1, (name, deciders(objects, release))


def test_each_release_has_its_budget_for_drains_and_its_service(rendered: Rendered) -> None:
    for name, objects in rendered.items():
        releases = names(objects, "Deployment") - {"image-test-redis"}
        assert names(objects, "PodDisruptionBudget") == releases, name
        assert releases <= names(objects, "Service"), name


def test_production_does_not_start_without_its_secret(rendered: Rendered) -> None:
    for name in OVERLAYS:
        for container in containers_of(rendered[name], SERVICE):
            [secret] = [
                entry["secretRef"] for entry in container["envFrom"] if "secretRef" in entry
            ]
            assert secret["name"] == "image-test-secrets"
            assert secret["optional"] == (not name.startswith("production"))


def test_a_pod_with_a_gpu_does_not_start_on_the_cpu(rendered: Rendered) -> None:
    for objects in rendered.values():
        for container in containers_of(objects, SERVICE):
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            must_use_it = {"name": "DEVICE", "value": "cuda"} in container.get("env", [])
            assert has_gpu == must_use_it


def test_what_is_referred_to_is_there(rendered: Rendered) -> None:
    for name, objects in rendered.items():
        for kind, referred in chain.from_iterable(map(references, objects)):
            assert referred in names(objects, kind), f"{name}: {kind} {referred}"


def test_each_object_is_there_once_and_in_the_namespace(rendered: Rendered) -> None:
    for name, objects in rendered.items():
        counts = Counter((entry["kind"], entry["metadata"]["name"]) for entry in objects)
        assert set(counts.values()) == {1}, name
        namespaces = {
            entry["metadata"].get("namespace") for entry in objects if entry["kind"] != "Namespace"
        }
        assert len(namespaces) == 1, name
        if name in OVERLAYS:
            assert names(objects, "Namespace") == namespaces
        for trigger in chain.from_iterable(
            entry["spec"]["triggers"] for entry in of_kind(objects, "ScaledObject")
        ):
            asked = set(re.findall('namespace="(.*?)"', trigger["metadata"]["query"]))
            # Its page says that the overlay's is to be there; ours for it have this one.
            assert asked == {"image-test"}, name
            assert name not in OVERLAYS or asked == namespaces


def test_pods_are_restricted(rendered: Rendered, upload: Object) -> None:
    """As the Pod Security Standard "restricted" wants them, and with less to write to."""
    deployments = of_kind(distinct(rendered), "Deployment")
    assert deployments
    for spec in [upload["spec"], *(entry["spec"]["template"]["spec"] for entry in deployments)]:
        assert spec["automountServiceAccountToken"] is False
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] > 10_000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = spec.get("volumes", [])
        kinds = set(chain.from_iterable(volume.keys() - {"name"} for volume in volumes))
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "image"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} == container["resources"]["requests"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            mounts = {mount["name"]: mount for mount in container.get("volumeMounts", [])}
            assert mounts.keys() == {volume["name"] for volume in volumes}
            assert spec == upload["spec"] or mounts.get("model", {}).get("readOnly", True)


@pytest.fixture(params=OVERLAYS)
def overlay(rendered: Rendered, request: pytest.FixtureRequest) -> list[Object]:
    return rendered[request.param]


def deployment(objects: list[Object]) -> Any:
    [found] = [
        entry
        for entry in of_kind(objects, "Deployment")
        if entry["metadata"]["name"] == "image-test"
    ]
    return found


def settings(objects: list[Object]) -> dict[str, str]:
    [found] = [
        entry
        for entry in of_kind(objects, "ConfigMap")
        if entry["metadata"]["name"].startswith("image-test-settings-")
    ]
    data: dict[str, str] = found["data"]
    return data


def test_grafana_finds_the_dashboard_wherever_prometheus_does_the_pods(
    rendered: Rendered, project: BakedProject
) -> None:
    for name, objects in rendered.items():
        dashboards = [
            entry
            for entry in of_kind(objects, "ConfigMap")
            if entry["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
        ]
        assert len(dashboards) == len(of_kind(objects, "PodMonitor")), name
        for entry in dashboards:
            assert entry["metadata"]["name"] == "image-test-dashboard"
            dashboard = project.read("deploy/grafana/dashboard.json")
            assert entry["data"] == {"image-test.json": dashboard}
            # `kubectl apply` keeps a copy of the object in an annotation, which may be so long.
            assert len(json.dumps(entry)) < 262_144


def test_a_stop_has_the_time_that_it_needs(overlay: list[Object]) -> None:
    pod = deployment(overlay)["spec"]["template"]["spec"]
    [container] = pod["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = int(settings(overlay)["SHUTDOWN_GRACE_S"])
    assert before + grace + TO_END_S <= pod["terminationGracePeriodSeconds"]


def test_the_configuration_is_of_settings_that_exist(overlay: list[Object]) -> None:
    source = (TEMPLATE / "app/settings.py").read_text(encoding="utf-8")
    known = {name.upper() for name in re.findall(r"^    (\w+): ", source, re.MULTILINE)}
    [container] = deployment(overlay)["spec"]["template"]["spec"]["containers"]
    given = {variable["name"] for variable in container.get("env", [])}
    assert settings(overlay).keys() | given <= known


def test_the_startup_may_take_as_long_as_a_rollout_waits_for_it(overlay: list[Object]) -> None:
    spec = deployment(overlay)["spec"]
    [container] = spec["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    budget_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert budget_s < spec["progressDeadlineSeconds"]


def test_a_gpu_is_asked_for_where_the_image_needs_one(rendered: Rendered) -> None:
    for name in OVERLAYS:
        [container] = deployment(rendered[name])["spec"]["template"]["spec"]["containers"]
        assert container["image"].endswith("-cuda") == (
            "nvidia.com/gpu" in container["resources"]["limits"]
        )


def test_the_commands_of_the_page_are_what_kubectl_takes(
    project: BakedProject, containers: Containers, tmp_path: Path
) -> None:
    """There is no cluster: all that it may say is that it finds none."""
    shutil.copytree(project.path, tmp_path / "project")
    copy = BakedProject(tmp_path / "project")
    copy.write("secrets.env", "REDIS_URL=redis://localhost")
    copy.write("config", KUBECONFIG)
    (copy.path / "artifacts/fraud").mkdir(parents=True)
    page = copy.read("docs/deploy.md")
    found = re.findall(r"(?:^ *|`)(kubectl [^`\n]+?)`?$", page, re.MULTILINE)
    commands = [*found, *re.findall(r"`(kubectl [^`\n]+)`", page)]
    assert len(commands) > 8
    for command in commands:
        path = f"{containers.kubectl_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=copy.path,
            env={"PATH": path, "HOME": str(tmp_path), "KUBECONFIG": "config"},
            capture_output=True,
            text=True,
            check=False,
        )
        needs_none = command.startswith("kubectl kustomize")
        assert (done.returncode == 0) == needs_none, command
        found_none = re.search("127.0.0.1:1(: connect: connection| was) refused", done.stderr)
        assert needs_none or found_none, (command, done.stderr)
