"""Finds the predictor files and checks that each keeps to the contract of `app.predictor`."""

import hashlib
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from app.errors import StartupError, on_one_line
from app.predictor import BaseFeatures, BasePrediction, BasePredictor

log = logging.getLogger(__name__)

PredictorClass = type[BasePredictor[Any, Any]]

SOURCE_SHA256 = "__source_sha256__"
"""The attribute of a predictor's module that says what it was made from."""


def discover(predictors_dir: Path) -> dict[str, PredictorClass]:
    """The predictor class of every file in `predictors_dir`, by the file's name.

    Files whose name begins with an underscore are helpers of the others.

    Raises:
        StartupError: there is none, or a file does not keep to the contract.
    """
    paths = sorted(predictors_dir.glob("[!_]*.py"))
    if not paths:
        raise StartupError(f"No predictor in {predictors_dir}/; add a file, or set PREDICTORS_DIR")
    return {path.stem: _predictor_in(path) for path in paths}


def _predictor_in(path: Path) -> PredictorClass:
    if not path.stem.isidentifier():
        raise StartupError(f"{path}: name the file like a Python variable; it names the model")
    try:
        module = _import(path)
    except Exception as error:
        log.debug("%s cannot be imported", path, exc_info=True)
        raise StartupError(f"{path} cannot be imported: {on_one_line(error, path)}") from error
    classes: list[PredictorClass] = [
        member
        for member in vars(module).values()
        if isinstance(member, type)
        and issubclass(member, BasePredictor)
        and member.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise StartupError(
            f"{path}: expected one class Predictor(BasePredictor[Features, Prediction]), "
            f"found {len(classes)}"
        )
    _check_contract(path, classes[0])
    return classes[0]


def _import(path: Path) -> ModuleType:
    # Under the name that an import statement gives it, as pickles refer to it so.
    name = f"predictors.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.absolute())
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    # As the loader does, but the digest is of what is run, whatever becomes of the file meanwhile.
    source = path.read_bytes()
    sys.modules[name] = module
    vars(module)[SOURCE_SHA256] = hashlib.sha256(source).hexdigest()
    try:
        exec(compile(source, path.absolute(), "exec", dont_inherit=True), vars(module))  # noqa: S102
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_contract(path: Path, predictor: PredictorClass) -> None:
    if not hasattr(predictor, "features"):
        raise StartupError(f"{path}: derive Predictor from BasePredictor[Features, Prediction]")
    if not issubclass(predictor.features, BaseFeatures):
        raise StartupError(f"{path}: derive Features from BaseFeatures")
    if not issubclass(predictor.prediction, BasePrediction):
        raise StartupError(f"{path}: derive Prediction from BasePrediction")
    for nested in _models_in(predictor.features.__pydantic_core_schema__):
        if not issubclass(nested, BaseFeatures):
            raise StartupError(
                f"{path}: derive {nested.__name__} from BaseFeatures, as Features holds it"
            )
    if missing := sorted(predictor.__abstractmethods__):
        raise StartupError(f"{path}: Predictor has no {' and no '.join(missing)}")
    if not isinstance(getattr(predictor, "example", None), predictor.features):
        raise StartupError(f"{path}: give Predictor a class attribute example = Features(...)")
    _check_batching(path, predictor)


def _check_batching(path: Path, predictor: PredictorClass) -> None:
    sizes = predictor.allowed_batch_sizes
    if list(sizes) != sorted(set(sizes)) or any(size < 1 for size in sizes):
        raise StartupError(
            f"{path}: allowed_batch_sizes has to be numbers from 1, the smallest first"
        )
    for name in ("batch_max_rows", "queue_max_rows", "instances"):
        value = getattr(predictor, name)
        if value is not None and value < 1:
            raise StartupError(f"{path}: {name} has to be at least 1")


def _models_in(schema: Any) -> list[type]:
    """The model classes in a pydantic core schema, which is made of dicts and lists."""
    if isinstance(schema, dict):
        own = [schema["cls"]] if schema.get("type") == "model" else []
        return own + [cls for value in schema.values() for cls in _models_in(value)]
    if isinstance(schema, list | tuple):
        return [cls for value in schema for cls in _models_in(value)]
    return []
