"""Refuses answers that could not work, before anything is written. Needs the stdlib alone."""

import json
import keyword
import re
import sys
from pathlib import Path

# As JSON in a raw string, in which `tojson` leaves no quote: answers are data, never code.
ANSWERS = json.loads(r'{{ cookiecutter | tojson }}')  # fmt: skip

TEXT = r"[\w .,:;()'&+/%!?-]+"
RULES = {
    "project_name": (TEXT, "letters, digits, spaces and . , : ; ( ) ' & + / % ! ? -"),
    "project_slug": (
        # A Service's name, with room for "-from-monitoring" behind it.
        r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?",
        "at most 47 of a-z, 0-9 and -, beginning with a letter and not ending with -",
    ),
    "description": (TEXT, "letters, digits, spaces and . , : ; ( ) ' & + / % ! ? -"),
    "model_name": (
        r"[a-z][a-z0-9_]{0,39}",
        "at most 40 of a-z, 0-9 and _, beginning with a letter",
    ),
    "image_registry": (
        r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?(/[a-z0-9]+([._-][a-z0-9]+)*)*",
        "a host with an optional port and path, such as registry.example.com/team",
    ),
}
MAX_CHARS = 200
WORDS_OF_YAML = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def fault(answers: dict[str, str]) -> str | None:
    """What is wrong with the answers, and what would be right; on one line."""
    for name, (pattern, right) in RULES.items():
        answer = answers[name]
        if len(answer) > MAX_CHARS or not re.fullmatch(pattern, answer) or answer != answer.strip():
            return f"{name} {json.dumps(answer[:MAX_CHARS])} cannot be used; give {right}."
    if answers["project_slug"] in WORDS_OF_YAML:
        return (
            f'project_slug "{answers["project_slug"]}" cannot be used, as it is a word of YAML; '
            f'give another of a-z, 0-9 and -, such as "{answers["project_slug"]}-service".'
        )
    name = answers["model_name"]
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        return f'model_name "{name}" is a word of Python; give another, such as "{name}_model".'
    return None


def remove_nested_folders(project: Path, slug: str) -> None:
    """Remove the folders that slashes in the slug have made; cookiecutter removes the last only."""
    for folder in [project, *project.parents][: len(Path(slug).parts)]:
        try:
            folder.rmdir()
        except OSError:
            return


if __name__ == "__main__":
    if message := fault(ANSWERS):
        print(f"ERROR: {message}", file=sys.stderr)
        if len(Path(ANSWERS["project_slug"]).parts) > 1:
            remove_nested_folders(Path.cwd(), ANSWERS["project_slug"])
        sys.exit(1)
