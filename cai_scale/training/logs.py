"""Quiet libraries: what matters they raise as errors; their notes would drown our own lines."""

import logging
import os
import warnings


def quiet() -> None:
    """Silence the notes and progress bars of the libraries that train and export."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, and warns
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import transformers
    import transformers.utils.logging

    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    training = ("deepspeed", "DeepSpeed", "trl", "accelerate", "torch", "httpx2")
    for name in (*training, "onnxruntime", "onnx_ir", "onnxscript", "neural_compressor"):
        logging.getLogger(name).setLevel(logging.ERROR)
