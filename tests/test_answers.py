"""Answers that could not work, or mean harm, are refused with one line and leave nothing."""

import tomllib
from collections.abc import Callable

import pytest

from tests.conftest import BakedProject, Refusal

HOSTILE_TEXTS = [
    'say "hi"',
    "back\\slash",
    "ends with a backslash\\",
    "two\nlines",
    "tab\there",
    "'''); import os; os.abort() #",
    "{{ cookiecutter.__class__ }}",
    "{% raw %}",
    "$(touch pwned)",
    "`touch pwned`",
    "<script>",
    "# comment",
    "nul\x01",
    "right-to-left \u202e",
    "zero\u200bwidth",
    "",
    " padded ",
    "x" * 201,
]


@pytest.mark.parametrize("question", ["project_name", "description"])
@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_texts_that_could_become_code_are_refused(
    refuse: Callable[..., Refusal], question: str, text: str
) -> None:
    refusal = refuse(**{question: text, "project_slug": "x"})
    assert refusal.returncode != 0
    assert refusal.left_behind == []
    assert len(refusal.errors) == 1
    assert refusal.errors[0].startswith(f"ERROR: {question} ")
    assert "give letters, digits, spaces" in refusal.errors[0]


@pytest.mark.parametrize(
    "slug",
    [
        "Fraud",
        "fraud_detection",
        "-fraud",
        "fraud-",
        "fraud.detection",
        "frаud",  # noqa: RUF001  the third letter is Cyrillic
        "a/b/c",
        "../fraud",
        "../a/b",
        "a" * 48,
        "3d-segmentation",
        "2024",
        "no",
        "fraud detection",
        "fraud;ls",
        "$(ls)",
    ],
)
def test_slugs_that_are_no_dns_label_are_refused(refuse: Callable[..., Refusal], slug: str) -> None:
    refusal = refuse(project_slug=slug)
    assert refusal.returncode != 0
    assert refusal.left_behind == []
    assert len(refusal.errors) == 1
    assert "project_slug" in refusal.errors[0]
    assert "a-z, 0-9 and -" in refusal.errors[0]


@pytest.mark.parametrize(
    "name", ["Fraud", "1st", "my-model", "a.b", "../x", "_hidden", "modèle", "", "a b", "a" * 41]
)
def test_model_names_that_are_no_python_names_are_refused(
    refuse: Callable[..., Refusal], name: str
) -> None:
    refusal = refuse(model_name=name)
    assert refusal.returncode != 0
    assert refusal.left_behind == []
    assert "model_name" in refusal.errors[0]


@pytest.mark.parametrize("name", ["class", "match", "async"])
def test_words_of_python_are_refused_with_a_better_name(
    refuse: Callable[..., Refusal], name: str
) -> None:
    refusal = refuse(model_name=name)
    assert refusal.returncode != 0
    assert refusal.left_behind == []


@pytest.mark.parametrize(
    "registry",
    [
        "",
        "https://registry.example.com",
        "registry.example.com/",
        "Registry/x",
        "a b",
        "x:y",
        "a//b",
    ],
)
def test_registries_that_no_image_can_be_named_after_are_refused(
    refuse: Callable[..., Refusal], registry: str
) -> None:
    refusal = refuse(image_registry=registry)
    assert refusal.returncode != 0
    assert refusal.left_behind == []


@pytest.mark.parametrize("kind", ["pytorch", "ONNX", ""])
def test_kinds_that_do_not_exist_are_refused(refuse: Callable[..., Refusal], kind: str) -> None:
    refusal = refuse(model_kind=kind)
    assert refusal.returncode != 0
    assert refusal.left_behind == []


def test_good_answers_arrive_unchanged(bake: Callable[..., BakedProject]) -> None:
    name = "Détection de fraude (l'été): 100% & more/less?"
    project = bake(
        project_name=name,
        description="Бодрое утро, 世界!",
        model_name="churn_v2",
        image_registry="registry.example.com:5000/team/ml",
    )
    assert project.path.name == "detection-de-fraude-l-ete-100-more-less"
    config = tomllib.loads(project.read("pyproject.toml"))
    assert config["project"]["name"] == project.path.name
    assert config["project"]["description"] == "Бодрое утро, 世界!"
    assert config["tool"]["service"]["service_title"] == name
    assert config["tool"]["service"]["default_model"] == "churn_v2"
    image = config["tool"]["service"]["image"]["name"]
    assert image == f"registry.example.com:5000/team/ml/{project.path.name}"
