"""Projects as they are made: exactly the files they should have, all of them sound."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BakedProject, make_project

FILES = [
    ".dockerignore",
    ".gitignore",
    "Dockerfile",
    "Makefile",
    "README.md",
    "compose.yaml",
    "gunicorn.conf.py",
    "pyproject.toml",
    "docs/deploy.md",
    "docs/runbook.md",
    "deploy/grafana/dashboard.json",
    "deploy/grafana/kustomization.yaml",
    "deploy/grafana/provisioning/dashboards/dashboards.yaml",
    "deploy/grafana/provisioning/datasources/prometheus.yaml",
    "deploy/prometheus/prometheus.yaml",
    "deploy/prometheus/rules.yaml",
    "deploy/prometheus/rules_test.yaml",
    "deploy/kubernetes/components/monitoring/prometheusrule.yaml",
    "deploy/kubernetes/base/deployment.yaml",
    "deploy/kubernetes/base/kustomization.yaml",
    "deploy/kubernetes/base/networkpolicy.yaml",
    "deploy/kubernetes/base/poddisruptionbudget.yaml",
    "deploy/kubernetes/base/service.yaml",
    "deploy/kubernetes/base/serviceaccount.yaml",
    "deploy/kubernetes/base/settings.env",
    "deploy/kubernetes/components/autoscale-hpa/horizontalpodautoscaler.yaml",
    "deploy/kubernetes/components/autoscale-hpa/kustomization.yaml",
    "deploy/kubernetes/components/autoscale-keda/kustomization.yaml",
    "deploy/kubernetes/components/autoscale-keda/scaledobject.yaml",
    "deploy/kubernetes/components/blue-green/green/kustomization.yaml",
    "deploy/kubernetes/components/blue-green/kustomization.yaml",
    "deploy/kubernetes/components/blue-green/live.yaml",
    "deploy/kubernetes/components/canary/httproute.yaml",
    "deploy/kubernetes/components/canary/kustomization.yaml",
    "deploy/kubernetes/components/canary/release/kustomization.yaml",
    "deploy/kubernetes/components/model-image/kustomization.yaml",
    "deploy/kubernetes/components/model-volume/kustomization.yaml",
    "deploy/kubernetes/components/model-volume/persistentvolumeclaim.yaml",
    "deploy/kubernetes/components/monitoring/kustomization.yaml",
    "deploy/kubernetes/components/monitoring/networkpolicy.yaml",
    "deploy/kubernetes/components/monitoring/podmonitor.yaml",
    "deploy/kubernetes/components/namespace/kustomization.yaml",
    "deploy/kubernetes/components/namespace/namespace.yaml",
    "deploy/kubernetes/components/redis-external/kustomization.yaml",
    "deploy/kubernetes/components/redis-external/networkpolicy.yaml",
    "deploy/kubernetes/components/rollouts-autoscaled/kustomization.yaml",
    "deploy/kubernetes/components/model-volume/upload.yaml",
    "deploy/kubernetes/components/redis/deployment.yaml",
    "deploy/kubernetes/components/redis/kustomization.yaml",
    "deploy/kubernetes/components/redis/networkpolicy.yaml",
    "deploy/kubernetes/components/redis/service.yaml",
    "deploy/kubernetes/components/rollouts/analysistemplate.yaml",
    "deploy/kubernetes/components/rollouts/kustomization.yaml",
    "deploy/kubernetes/components/rollouts/rollout.yaml",
    "deploy/kubernetes/overlays/dev/kustomization.yaml",
    "deploy/kubernetes/overlays/production/kustomization.yaml",
    "deploy/kubernetes/overlays/staging/kustomization.yaml",
    "app/__init__.py",
    "app/__main__.py",
    "app/access_log.py",
    "app/artifacts.py",
    "app/batching.py",
    "app/breaker.py",
    "app/cache.py",
    "app/canonical.py",
    "app/cpus.py",
    "app/deadlines.py",
    "app/discovery.py",
    "app/drift.py",
    "app/errors.py",
    "app/faults.py",
    "app/flights.py",
    "app/healthcheck.py",
    "app/inference.py",
    "app/intake.py",
    "app/jobs.py",
    "app/known_bodies.py",
    "app/lifecycle.py",
    "app/logs.py",
    "app/main.py",
    "app/memory_store.py",
    "app/metrics.py",
    "app/passed_by.py",
    "app/predictor.py",
    "app/protocol.py",
    "app/publish.py",
    "app/queues.py",
    "app/redis_store.py",
    "app/reference.py",
    "app/repository.py",
    "app/runner.py",
    "app/server_settings.py",
    "app/serving.py",
    "app/settings.py",
    "app/shared_run.py",
    "app/structured.py",
    "app/tensor.py",
    "app/tensor_parser.py",
    "app/tickets.py",
    "app/token_bucket.py",
    "app/traceparent.py",
    "app/tracing.py",
    "app/train.py",
    "app/waiting.py",
    "app/worker.py",
    "app/api/__init__.py",
    "app/api/instrumentation.py",
    "app/api/json_route.py",
    "app/api/keys.py",
    "app/api/middleware.py",
    "app/api/models.py",
    "app/api/observers.py",
    "app/api/openapi.py",
    "app/api/platforms.py",
    "app/api/predict.py",
    "app/api/probes.py",
    "app/api/problems.py",
    "app/api/reply.py",
    "app/api/bodies.py",
    "app/api/form.py",
    "app/api/status.css",
    "app/api/status.html",
    "app/api/status.js",
    "app/api/status_page.py",
    "loadtest/__init__.py",
    "loadtest/__main__.py",
    "loadtest/advice.py",
    "loadtest/batches.py",
    "loadtest/client.py",
    "loadtest/driver.py",
    "loadtest/measure.py",
    "loadtest/reasons.py",
    "loadtest/report.py",
    "loadtest/service.py",
    "loadtest/variations.py",
    "predictors/churn.py",
    "training/churn.py",
    "tests/test_churn.py",
    "tests/conftest.py",
    "requirements/dev.in",
    "requirements/dev.lock",
    "requirements/model.in",
    "requirements/service.in",
    "requirements/service.lock",
    "requirements/train.in",
    "tests/service/conftest.py",
    "tests/service/server.py",
    "tests/service/collecting.py",
    "tests/service/caching.py",
    "tests/service/redis_server.py",
    "tests/service/predictors/double.py",
    "tests/service/predictors/faulty.py",
    "tests/service/predictors/gate.py",
    "tests/service/test_api.py",
    "tests/service/test_intake.py",
    "tests/service/test_jobs.py",
    "tests/service/test_loadtest.py",
    "tests/service/test_logs.py",
    "tests/service/test_lookups.py",
    "tests/service/test_memory.py",
    "tests/service/test_observers.py",
    "tests/service/test_platforms.py",
    "tests/service/test_arrays.py",
    "tests/service/test_artifacts.py",
    "tests/service/test_batches.py",
    "tests/service/test_batching.py",
    "tests/service/test_batching_machine.py",
    "tests/service/test_bodies.py",
    "tests/service/test_cache.py",
    "tests/service/test_cached_service.py",
    "tests/service/test_canonical.py",
    "tests/service/test_cpus.py",
    "tests/service/test_drift.py",
    "tests/service/test_failing_batches.py",
    "tests/service/test_failures.py",
    "tests/service/test_flights.py",
    "tests/service/test_protocol.py",
    "tests/service/test_queues.py",
    "tests/service/test_redis.py",
    "tests/service/test_requests.py",
    "tests/service/test_requirements.py",
    "tests/service/test_runner.py",
    "tests/service/test_server_settings.py",
    "tests/service/test_settings.py",
    "tests/service/test_shared_runs.py",
    "tests/service/test_start.py",
    "tests/service/test_status_page.py",
    "tests/service/test_stop.py",
    "tests/service/test_tensor.py",
    "tests/service/test_tracing.py",
    "tests/service/test_waiting.py",
    "tests/service/test_workers.py",
    "tests/service/tls_proxy.py",
]
LEFT = r"\{\{(?!args\.)|\{%|%\}|cookiecutter\."
ONNX_FILES = [
    "app/onnx.py",
    "requirements/service-cuda.lock",
    "tests/service/test_onnx.py",
    "deploy/kubernetes/components/gpu/deployment.yaml",
    "deploy/kubernetes/components/gpu/kustomization.yaml",
    "deploy/kubernetes/overlays/production-gpu/kustomization.yaml",
]


@pytest.fixture(scope="module")
def project(template: Path, tmp_path_factory: pytest.TempPathFactory, kind: str) -> BakedProject:
    """Only to be read."""
    answers = {"model_kind": kind, "model_name": "churn", "project_name": "Churn"}
    return make_project(template, tmp_path_factory.mktemp("projects"), **answers)


def test_it_has_exactly_these_files(project: BakedProject, kind: str) -> None:
    assert project.files() == {*FILES, *(ONNX_FILES if kind != "sklearn" else [])}


def test_nothing_of_the_template_is_left(project: BakedProject) -> None:
    samples = r"\b(predictors|training|artifacts)[./](fraud|wine|digits)\b"
    for name in project.files():
        text = project.read(name)
        if name.endswith(".json"):
            # Of Grafana, for labels.
            text = re.sub(r'"legendFormat": ".*?"', "", text)
        # The service renders its page itself.
        left = r"cookiecutter\." if name.endswith(".html") else LEFT
        assert not re.search(left, text), name
        assert not re.search(samples, text), name
        assert "\r" not in text
        assert text.endswith("\n") or not text
        if name.endswith(".py"):
            ast.parse(text)
        if name.endswith(".toml"):
            tomllib.loads(text)


def test_the_readme_names_files_that_exist(project: BakedProject) -> None:
    readme = project.read("README.md")
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (project.path / target).exists()
    mentioned = re.findall(r"`([a-z_/]+(?:\.(?:py|in|lock|toml)|/))`", readme)
    assert len(mentioned) > 10
    for name in set(mentioned) - {"artifacts/"}:
        assert any(
            Path(project.path, folder, name).exists() for folder in ("", "app", "requirements")
        ), name
    assert "\n\n\n" not in readme


def test_a_project_made_twice_is_the_same(
    bake: Callable[..., BakedProject], template: Path, tmp_path: Path
) -> None:
    project = bake(model_kind="image")
    before = {name: project.read(name) for name in project.files()}
    again = ["cookiecutter", "--no-input", "--overwrite-if-exists", "--output-dir", str(tmp_path)]
    subprocess.run([*again, str(template), "model_kind=image"], check=True, capture_output=True)
    assert {name: project.read(name) for name in project.files()} == before


def test_the_next_commands_are_told(template: Path, tmp_path: Path) -> None:
    command = ["cookiecutter", "--no-input", "--output-dir", str(tmp_path), str(template)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "cd fraud-detection\n    make run" in told
    assert "predictors/fraud.py" in told


def test_hadolint_has_nothing_against_its_dockerfile(project: BakedProject) -> None:
    project.run("hadolint", "Dockerfile")
