"""What a model's exception means for the batches after it. Knows CUDA by its messages alone."""

from app.errors import ModelLost, OutOfMemory, PredictionFailed
from app.predictor import Provider

OUT_OF_MEMORY_DETAIL = "The model ran out of memory on this request."
OUT_OF_MEMORY = (
    "out of memory",
    "failed to allocate memory",
    "bad_alloc",
    "alloc_failed",
    "resource_exhausted",
)
"""What PyTorch, ONNX Runtime, CuPy, cuBLAS, cuDNN and TensorFlow say of full memory."""

BROKEN_CONTEXT = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "invalid program counter",
    "not supported on shared or local address space",
    "context is destroyed",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
)
"""`cudaGetErrorString` of the errors after which, in the words of CUDA's reference of
`cudaError_t`, the process must be terminated and relaunched."""


def failure(error: BaseException, provider: Provider) -> PredictionFailed:
    """What `error`, which `predict` raised on `provider`, is to the collector. The caller is not
    told why.

    Errors of the kinds that data causes are that, whatever they say: they tend to quote it.
    """
    if isinstance(error, MemoryError):
        return OutOfMemory(OUT_OF_MEMORY_DETAIL)
    if not isinstance(error, (ValueError, LookupError, TypeError, ArithmeticError)):
        text = f"{type(error).__name__}: {error}".lower()
        is_cuda = provider == "cuda" and "cuda" in text
        if is_cuda and any(phrase in text for phrase in BROKEN_CONTEXT):
            return ModelLost("The model's device failed.")
        if any(phrase in text for phrase in OUT_OF_MEMORY):
            return OutOfMemory(OUT_OF_MEMORY_DETAIL)
    return PredictionFailed("The model failed on this request.")
