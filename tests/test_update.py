"""`cruft update` brings the template's changes and keeps what its user has written."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, REPOSITORY, BakedProject
from tests.test_baked_projects import serving

IDENTITY = ["-c", "user.name=Test", "-c", "user.email=test@example.com"]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", *IDENTITY, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def upstream(template: Path, tmp_path: Path) -> Path:
    """A repository of the template with two commits: the one before this state, and this state.

    Where git has no earlier commit (a first commit, a shallow clone), the earlier one is this
    state with a change in app/.
    """
    repository = tmp_path / "upstream"
    repository.mkdir()
    git(repository, "init", "--quiet", "--initial-branch=main")
    previous = subprocess.run(
        ["git", "archive", "HEAD~1"], cwd=REPOSITORY, capture_output=True, check=False
    )
    if previous.returncode == 0:
        subprocess.run(["tar", "-x", "-C", repository], input=previous.stdout, check=True)
    else:
        shutil.copytree(template, repository, dirs_exist_ok=True)
        main = repository / "{{cookiecutter.project_slug}}" / "app" / "main.py"
        main.write_text(main.read_text() + "\n# Earlier.\n")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "before")
    for entry in repository.iterdir():
        if entry.name != ".git":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(
        template, repository, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build")
    )
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--allow-empty", "--message", "after")
    return repository


def cruft(folder: Path, *arguments: str) -> None:
    command = ["cruft", *arguments]
    environment = ENVIRONMENT | {"GIT_AUTHOR_NAME": "Test", "GIT_COMMITTER_NAME": "Test"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_user_wrote_survives_an_update_and_runs(upstream: Path, tmp_path: Path) -> None:
    cruft(tmp_path, "create", str(upstream), "--checkout", "main~1", "--no-input")
    project = BakedProject(tmp_path / "fraud-detection")
    edits = {
        "predictors/fraud.py": ("FRAUD_THRESHOLD = 0.5", "FRAUD_THRESHOLD = 0.999"),
        "training/fraud.py": ("make_payments(20_000)", "make_payments(10_000)"),
        "tests/test_fraud.py": ('assert risky["is_fraud"]', 'assert not risky["is_fraud"]'),
        "requirements/model.in": ("# What", "# Mine. What"),
        "README.md": ("## Settings", "## My settings"),
    }
    for path, (old, new) in edits.items():
        text = project.read(path)
        assert old in text
        project.write(path, text.replace(old, new))
    project.write("predictors/_helper.py", '"""A file that the template does not have."""\n')
    git(project.path, "init", "--quiet")
    git(project.path, "add", "--all")
    git(project.path, "commit", "--quiet", "--message", "mine")
    mine = {path: project.read(path) for path in [*edits, "predictors/_helper.py"]}

    cruft(project.path, "update", "--skip-apply-ask", "--checkout", "main")

    after = git(upstream, "rev-parse", "main").strip()
    assert json.loads(project.read(".cruft.json"))["commit"] == after
    assert {path: project.read(path) for path in mine} == mine
    assert not list(project.path.rglob("*.rej"))
    template = upstream / "{{cookiecutter.project_slug}}"
    for source in sorted((template / "app").rglob("*.py")):
        name = source.relative_to(template).as_posix()
        assert project.read(name) == source.read_text(encoding="utf-8")
    project.run("make", "lock", "install")
    with serving(project, "make run") as port:
        body = (
            '{"features": {"transaction_amount": 1250, "merchant_category": "electronics", '
            '"user_account_age_days": 12, "hour_of_day": 3}}'
        )
        headers = ["-H", "Content-Type: application/json"]
        url = f"localhost:{port}/v1/predict"
        answer = json.loads(project.run("curl", "-s", url, *headers, "-d", body))
    # The user's threshold, not the template's.
    assert not answer["prediction"]["is_fraud"]
