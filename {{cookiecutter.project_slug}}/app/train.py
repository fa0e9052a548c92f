"""Trains every model that has a script in training/ and no version yet.

python -m app.train
"""

import subprocess
import sys
from pathlib import Path

from app import artifacts
from app.errors import StartupError
from app.settings import load_settings


def main() -> None:
    try:
        settings = load_settings()
    except StartupError as error:
        sys.exit(str(error))
    for script in sorted(Path("training").glob("[!_]*.py")):
        if not artifacts.versions(settings.artifacts_dir, script.stem):
            subprocess.run([sys.executable, "-m", f"training.{script.stem}"], check=True)


if __name__ == "__main__":
    main()
