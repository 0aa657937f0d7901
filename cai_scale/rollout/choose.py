"""Which sampler a job uses."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from cai_scale.commands import require

NEEDED = ("onnx", "onnx_ir", "onnxscript", "onnxruntime_genai")
GATHERS = "under ZeRO-3 generate gathers the weights at every token, --sampler openai need not"


@dataclass(frozen=True)
class Choice:
    """A sampler's name, without "auto", and why it was taken."""

    name: str
    reason: str


def choose(
    name: str,
    *,
    gpu: bool,
    fusible: Callable[[], bool],
    live: bool = False,
    stage: int = 0,
) -> Choice:
    """Settle `--sampler`.

    Args:
        gpu: whether the model runs on a GPU.
        fusible: whether the model's architecture has a fused graph, which makes onnx the faster
            one on a CPU; asked only where that decides.
        live: whether each step samples, so that a graph would have to be exported at each.
        stage: of ZeRO, from 0 to 3.

    Raises:
        MissingError: an exported graph, or a server, was asked for and a library for it is not
            installed.
    """
    choice = _settle(name, gpu=gpu, fusible=fusible, live=live)
    if choice.name == "transformers" and live and stage == 3:
        return Choice(choice.name, f"{choice.reason}; {GATHERS}")
    return choice


def _settle(name: str, *, gpu: bool, fusible: Callable[[], bool], live: bool) -> Choice:
    missing = next((library for library in NEEDED if find_spec(library) is None), None)
    if name.startswith("onnx"):
        require(f"--sampler {name}", "export", *NEEDED)
    if name == "openai":
        require("--sampler openai", "train", "openai")
    if name != "auto":
        return Choice(name, "as asked")
    if live:
        return Choice("transformers", "from the weights under training")
    if gpu:
        return Choice("transformers", "on a GPU")
    if missing:
        return Choice("transformers", "faster with cai-scale[export]")
    if not fusible():
        return Choice("transformers", "no fused graph for this architecture")
    return Choice("onnx", "on a CPU")
