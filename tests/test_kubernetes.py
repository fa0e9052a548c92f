"""The manifests: rendered, valid in the last minors of Kubernetes, and in step with the service."""

import re
from collections.abc import Callable
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.conftest import TEMPLATE, BakedProject
from tests.containers import Containers

MINORS = ("1.34", "1.35", "1.36", "1.37")
KUSTOMIZATIONS = ["base"]
TO_END_S = 5
"""What a service takes to end beside what it waits for."""

Objects = dict[str, dict[str, Any]]
"""By kind; there is one of each."""


@pytest.fixture(params=KUSTOMIZATIONS)
def rendered(
    bake: Callable[..., BakedProject], containers: Containers, request: pytest.FixtureRequest
) -> Objects:
    project = bake(project_name="Image Test")
    folder = project.path / "deploy/kubernetes" / request.param
    objects = list(yaml.safe_load_all(containers.kubectl("kustomize", folder)))
    assert len({entry["kind"] for entry in objects}) == len(objects)
    return {entry["kind"]: entry for entry in objects}


@pytest.mark.parametrize("minor", MINORS)
def test_they_are_valid(rendered: Objects, minor: str) -> None:
    for entry in rendered.values():
        kubernetes_validate.validate(entry, minor, strict=True)


def test_all_are_about_the_same_pods(rendered: Objects) -> None:
    labels = {"app.kubernetes.io/name": "image-test"}
    specs = {kind: entry.get("spec", {}) for kind, entry in rendered.items()}
    assert specs["Deployment"]["template"]["metadata"]["labels"] == labels
    assert specs["Service"]["selector"] == labels
    assert specs["NetworkPolicy"]["podSelector"] == {"matchLabels": labels}
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert specs[kind]["selector"] == {"matchLabels": labels}
    assert all(entry["metadata"]["labels"] == labels for entry in rendered.values())


def pod(rendered: Objects) -> dict[str, Any]:
    spec: dict[str, Any] = rendered["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_a_stop_has_the_time_that_it_needs(rendered: Objects) -> None:
    [container] = pod(rendered)["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = int(rendered["ConfigMap"]["data"]["SHUTDOWN_GRACE_S"])
    assert before + grace + TO_END_S <= pod(rendered)["terminationGracePeriodSeconds"]


def test_pods_are_restricted(rendered: Objects) -> None:
    """As the Pod Security Standard "restricted" wants them, and with less to write to."""
    spec = pod(rendered)
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert all(set(volume) - {"name"} == {"emptyDir"} for volume in spec["volumes"])
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"].keys() == {"requests", "limits"}


def test_the_configuration_is_of_settings_that_exist(rendered: Objects) -> None:
    settings = (TEMPLATE / "app/settings.py").read_text(encoding="utf-8")
    names = set(re.findall(r"^    (\w+): ", settings, re.MULTILINE))
    assert {name.lower() for name in rendered["ConfigMap"]["data"]} <= names


def test_the_startup_may_take_as_long_as_a_rollout_waits_for_it(rendered: Objects) -> None:
    [container] = pod(rendered)["containers"]
    probe = container["startupProbe"]
    budget_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert budget_s < rendered["Deployment"]["spec"]["progressDeadlineSeconds"]
