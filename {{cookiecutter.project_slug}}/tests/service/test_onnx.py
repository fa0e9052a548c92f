"""ONNX Runtime sessions: the device that was asked for, and threads for what the process has."""

import os
from pathlib import Path

import onnxruntime as ort
import pytest

from app import onnx as sessions
from app.cpus import usable_cpus
from app.errors import StartupError
from app.predictor import Device

onnx = pytest.importorskip("onnx")

HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A graph that answers what it is asked."""
    value = [onnx.helper.make_tensor_value_info(name, 1, ["rows"]) for name in ("x", "y")]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "identity", value[:1], value[1:])
    opset = onnx.helper.make_opsetid("", 20)
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_it_runs_on_the_cpu(model: Path, device: Device) -> None:
    session = sessions.open_session(model, device)
    assert session.run(None, {"x": [1.0, 2.0]})[0].tolist() == [1.0, 2.0]
    assert sessions.provider_of(session) == ("cuda" if HAS_CUDA and device == "auto" else "cpu")


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
def test_a_gpu_that_is_demanded_and_not_there_is_refused(model: Path) -> None:
    with pytest.raises(StartupError, match="no CUDA provider; install onnxruntime-gpu"):
        sessions.open_session(model, "cuda")


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
def test_a_provider_that_does_not_start_is_refused_with_the_library_that_is_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with onnxruntime-gpu where there is no driver; see the image for CUDA."""
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: offered)
    monkeypatch.setattr(ort, "preload_dlls", lambda **_: None)
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(StartupError, match=r"did not start: lib\w+") as refusal,
    ):
        sessions.open_session(model, "cuda")
    assert "\n" not in str(refusal.value)


def test_threads_are_those_of_the_process_not_of_the_machine(model: Path) -> None:
    options = sessions.open_session(model, "cpu").get_session_options()
    assert options.intra_op_num_threads == usable_cpus()
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    options = sessions.open_session(model, "cpu", threads=3).get_session_options()
    assert options.intra_op_num_threads == 3
