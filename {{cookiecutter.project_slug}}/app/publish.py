"""Publishes model files that you already have as the next version of a model.

python -m app.publish fraud model.onnx
"""

import argparse
import shutil
import sys
from pathlib import Path

from app.artifacts import MANIFEST, new_version, newest
from app.discovery import discover
from app.errors import StartupError
from app.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m app.publish", description=__doc__)
    parser.add_argument("model", help="name of the model: of its file in predictors/")
    parser.add_argument("files", nargs="+", type=Path, help="what its load() opens")
    arguments = parser.parse_args()
    for file in arguments.files:
        if not file.is_file():
            parser.error(f"{file} is not a file")
    names = [file.name for file in arguments.files]
    if len(set(names)) < len(names) or MANIFEST in names:
        parser.error(f"the files need different names, and none of them {MANIFEST}")
    try:
        settings = load_settings()
        predictors = discover(settings.predictors_dir)
    except StartupError as error:
        sys.exit(str(error))
    if arguments.model not in predictors:
        parser.error(f"no {settings.predictors_dir / arguments.model}.py; write it first")
    with new_version(
        settings.artifacts_dir,
        arguments.model,
        input_schema=predictors[arguments.model].features.model_json_schema(),
    ) as directory:
        for file in arguments.files:
            shutil.copyfile(file, directory / file.name)
    print(f"Published {newest(settings.artifacts_dir, arguments.model).directory}/")


if __name__ == "__main__":
    main()
