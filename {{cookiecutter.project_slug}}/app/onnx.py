"""Opening an ONNX Runtime session well: the right device or a clear refusal, and sane threads."""

import ctypes
from pathlib import Path

import onnxruntime as ort

from app.cpus import usable_cpus
from app.errors import StartupError
from app.predictor import Device, Provider

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


def open_session(path: Path, device: Device, threads: int | None = None) -> ort.InferenceSession:
    """A session for the model in `path`.

    Args:
        device: "auto" takes CUDA where onnxruntime has it, else the CPU.
        threads: for one operator; by default the CPUs that this process may use.

    Raises:
        StartupError: `device` is "cuda" and onnxruntime fell back to the CPU, which it does
            silently (microsoft/onnxruntime#21825).
    """
    options = ort.SessionOptions()
    # Left alone, onnxruntime counts the host's cores and ignores a container's quota
    # (microsoft/onnxruntime#29510).
    options.intra_op_num_threads = threads or usable_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3

    has_cuda = _CUDA in ort.get_available_providers()
    if device == "cuda" and not has_cuda:
        raise StartupError(
            "DEVICE=cuda, but this onnxruntime has no CUDA provider; install onnxruntime-gpu "
            "in its place, or set DEVICE=cpu"
        )
    providers: list[str | tuple[str, dict[str, str]]] = [_CPU]
    if has_cuda and device != "cpu":
        ort.preload_dlls(directory="")
        # The default, EXHAUSTIVE, takes hundreds of milliseconds for each new input shape.
        providers.insert(0, (_CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}))
    session = ort.InferenceSession(path, options, providers=providers)
    if device == "cuda" and provider_of(session) != "cuda":
        raise StartupError(
            f"DEVICE=cuda, but the CUDA provider did not start: {_missing_library()}; check the "
            "NVIDIA driver and the CUDA and cuDNN libraries, or set DEVICE=cpu"
        )
    return session


def _missing_library() -> str:
    """What the CUDA provider lacks, which onnxruntime writes to stderr and tells nobody."""
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    # The driver's comes first: without it the others are of no use.
    for library in ("libcuda.so.1", str(provider)):
        try:
            ctypes.CDLL(library)
        except OSError as error:
            return " ".join(str(error).split())
    return "all of its libraries are there"


def provider_of(session: ort.InferenceSession) -> Provider:
    return "cuda" if _CUDA in session.get_providers() else "cpu"
