"""Publishes model files that you already have as the next version of a model.

python -m app.publish fraud model.onnx
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.artifacts import MANIFEST, new_version, newest
from app.discovery import discover
from app.errors import StartupError, on_one_line
from app.predictor import BaseFeatures, BasePredictor
from app.reference import REFERENCE, describe
from app.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m app.publish", description=__doc__)
    parser.add_argument("model", help="name of the model: of its file in predictors/")
    parser.add_argument("files", nargs="+", type=Path, help="what its load() opens")
    parser.add_argument(
        "--sample",
        type=Path,
        help="rows of `Features` like those to come, a JSON object a line; drift is measured "
        "against their values",
    )
    arguments = parser.parse_args()
    for file in filter(None, [*arguments.files, arguments.sample]):
        if not file.is_file():
            parser.error(f"{file} is not a file")
    names = [file.name for file in arguments.files]
    if len(set(names)) < len(names) or {MANIFEST, REFERENCE} & set(names):
        parser.error(f"the files need different names, and none of them {MANIFEST} or {REFERENCE}")
    try:
        settings = load_settings()
        predictors = discover(settings.predictors_dir)
    except StartupError as error:
        sys.exit(str(error))
    if arguments.model not in predictors:
        parser.error(f"no {settings.predictors_dir / arguments.model}.py; write it first")
    predictor = predictors[arguments.model]
    sample: list[BaseFeatures] = []
    try:
        if arguments.sample:
            sample = read_sample(arguments.sample, predictor.features)
    except ValueError as error:
        parser.error(str(error))
    with new_version(
        settings.artifacts_dir,
        arguments.model,
        input_schema=predictor.features.model_json_schema(),
    ) as directory:
        for file in arguments.files:
            shutil.copyfile(file, directory / file.name)
        if sample:
            ask(directory, predictor, sample)
    print(f"Published {newest(settings.artifacts_dir, arguments.model).directory}/")


def ask(
    directory: Path, predictor: type[BasePredictor[Any, Any]], sample: list[BaseFeatures]
) -> None:
    """`describe`, or end with the reason why the model cannot be asked."""
    try:
        describe(directory, predictor, sample)
    except Exception as error:
        source = Path(sys.modules[predictor.__module__].__file__ or "")
        sys.exit(f"The model cannot score the sample: {on_one_line(error, source)}")


def read_sample(path: Path, features: type[BaseFeatures]) -> list[BaseFeatures]:
    """
    Raises:
        ValueError: with the first line that is no row.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(features.model_validate_json(line))
            except ValidationError as error:
                fault = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, fault["loc"])) or "JSON"
                raise ValueError(f"{path}: line {number}: {where}: {fault['msg']}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


if __name__ == "__main__":
    main()
