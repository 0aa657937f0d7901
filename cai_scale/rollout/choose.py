"""Which sampler a job uses."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from cai_scale.errors import MissingError

NEEDED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime_genai")


@dataclass(frozen=True)
class Choice:
    """A sampler's name, without "auto", and why it was taken."""

    name: str
    reason: str


def choose(name: str, *, gpu: bool, fusible: Callable[[], bool], stage: int = 0) -> Choice:
    """Settle `--sampler`.

    Args:
        gpu: whether the model runs on a GPU.
        fusible: whether the model's architecture has a fused graph, which makes onnx the faster
            one on a CPU; asked only where that decides.

    Raises:
        MissingError: an exported graph was asked for and cannot be made here.
    """
    missing = next((library for library in NEEDED if find_spec(library) is None), None)
    if name.startswith("onnx") and missing:
        raise MissingError(
            f"--sampler {name} needs {missing}, which is not installed; "
            f"pip install 'cai-scale[export]'"
        )
    if name != "auto":
        return Choice(name, "as asked")
    if gpu:
        return Choice("transformers", "on a GPU")
    if missing:
        return Choice("transformers", "faster with cai-scale[export]")
    if not fusible():
        return Choice("transformers", "no fused graph for this architecture")
    return Choice("onnx", "on a CPU")
