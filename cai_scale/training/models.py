"""Find and load a language model and its tokenizer: a folder, a hub name, or an alias."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cai_scale.errors import ConfigError, DataError, IntegrityError, MissingError
from cai_scale.records import Prompt, sha256
from cai_scale.training.aliases import ALIASES, cache, convert, packaged

if TYPE_CHECKING:
    import torch
    from transformers import (
        BitsAndBytesConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

# One plain template for models that bring none (GPT-2); it travels with the bundle.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].capitalize() }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


# What transformers and safetensors raise at files that are not what they should be.
LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError),
    SafetensorError,
)


def check(model: str) -> None:
    """Complain about a model that cannot be found, before anything is loaded.

    Raises:
        MissingError: no such folder, or an alias whose package is not installed.
        ConfigError: neither a folder, nor an alias, nor a name like owner/name.
    """
    alias = ALIASES.get(model)
    if alias is not None:
        if alias.package:
            packaged(model, alias)
        return
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingError(
                f"model folder {model} has no config.json; name a folder that save_pretrained wrote"
            )
        _refuse_pickles(path)
        return
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise ConfigError(
            f"unknown model {model!r}; name a folder, a hub's owner/name, or one of the aliases: "
            f"{', '.join(ALIASES)}"
        )


def resolve(model: str) -> str:
    """Where `from_pretrained` finds the model: a folder or a hub name.

    A packaged alias is converted once into the cache (`CAI_SCALE_CACHE`, by default
    `~/.cache/cai_scale`); two processes may do so at once and agree on the result.
    """
    check(model)
    alias = ALIASES.get(model)
    if alias is None:
        return model
    if not alias.package:
        return alias.repository
    gguf = packaged(model, alias)
    folder = cache() / f"{model}-{sha256(gguf)[:16]}"
    if not folder.is_dir():
        convert(gguf, folder)
    return str(folder)


def load_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """The tokenizer, with a pad token and a chat template."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def check_prompts(model: str, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """Read every prompt as the model will, before the model is loaded.

    Raises:
        ConfigError: the tokenizer or the template does not work.
        DataError: a prompt leaves no room for an answer of `new_tokens`.
    """
    from jinja2 import TemplateError

    room = getattr(load_config(model), "max_position_embeddings", None) or float("inf")
    tokenizer = load_tokenizer(model)
    if tokenizer.eos_token is None:
        raise ConfigError(f"model {model} has no end token; set eos_token in its tokenizer")
    for prompt in prompts:
        try:
            tokens = tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except (TemplateError, *LOADING_ERRORS) as error:
            raise ConfigError(
                f"model {model}: its chat template refuses prompt {prompt.id} ({error}); mend one"
            ) from None
        if not tokens:
            raise ConfigError(f"model {model}: its chat template renders nothing; mend it")
        if len(tokens) + new_tokens > room:
            raise DataError(
                f"prompt {prompt.id}: {len(tokens)} tokens and an answer of {new_tokens} exceed "
                f"the model's {room}; shorten the prompt"
            )


def load_config(model: str) -> "PretrainedConfig":
    """The model's configuration, without its weights."""
    from transformers import AutoConfig

    return _load(AutoConfig, model)


def load_model(
    model: str, dtype: "torch.dtype", *, quantization: "BitsAndBytesConfig | None" = None
) -> "PreTrainedModel":
    """The model in evaluation mode, on this rank's GPU where there is one.

    Under an active ZeRO-3 configuration, transformers partitions the weights as it loads them,
    and places them itself.
    """
    from transformers import AutoModelForCausalLM

    return _load_weights(AutoModelForCausalLM, model, dtype, quantization=quantization)[0]


def load_scorer(
    model: str,
    dtype: "torch.dtype",
    labels: Sequence[str],
    *,
    new_head: bool = False,
    seed: int = 0,
    objective: str = "regression",
    quantization: "BitsAndBytesConfig | None" = None,
) -> "PreTrainedModel":
    """The model with a score head of one output a label, placed as `load_model` does.

    Its forward pass is that of `scorer.Scorer`, not transformers' own.

    Args:
        labels: what the head's outputs are called, in order.
        new_head: whether the model may lack a head and get a new one: it is then trained, or
            comes with an adapter.
        seed: of a new head's random numbers.
        objective: what the head is trained to; kept in the model's configuration.
    """
    from transformers import AutoModelForSequenceClassification

    from cai_scale.training.scorer import HEAD, pool_by_mask, start_head

    head = f"{HEAD}.weight"
    if quantization is not None:
        quantization.llm_int8_skip_modules = [HEAD]  # it is trained, so not in 4 bits
    loaded, missing = _load_weights(
        AutoModelForSequenceClassification,
        model,
        dtype,
        may_lack={head} if new_head else set(),
        quantization=quantization,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    loaded.config.objective = objective
    if head in missing:
        start_head(loaded, seed)
    return pool_by_mask(loaded)


@contextmanager
def whole() -> Iterator[None]:
    """Models that are loaded in this block are not sharded, while one that is trained is."""
    from transformers.integrations import deepspeed

    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


def _load_weights(
    factory: Any,
    model: str,
    dtype: "torch.dtype",
    *,
    may_lack: Collection[str] = (),
    quantization: "BitsAndBytesConfig | None" = None,
    **options: Any,
) -> "tuple[PreTrainedModel, Collection[str]]":
    """The model in evaluation mode, and which of `may_lack` it had not."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device()}}
    loaded, report = _load(
        factory, model, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    missing = set(report["missing_keys"])
    if missing - set(may_lack):  # transformers would fill them with random numbers
        raise IntegrityError(
            f"model {model} lacks weights, {min(missing - set(may_lack))} among them; restore its "
            f"files"
        )
    if not is_deepspeed_zero3_enabled() and quantization is None:
        loaded.to(device())
    return loaded.eval(), missing


def device() -> "torch.device":
    """This rank's GPU, or the CPU."""
    import torch

    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else (torch.device("cpu"))
    )


def load_trained(model: str, product: Path | None, dtype: "torch.dtype") -> "PreTrainedModel":
    """A base model with a run's product: its adapter put on top, or its whole model instead.

    Args:
        product: a folder that a training left; None loads the base model as it is.
    """
    if product is None:
        return load_model(model, dtype)
    if is_adapter(product):
        return with_adapter(load_model(model, dtype), product)
    return load_model(str(product), dtype)


def is_adapter(product: Path) -> bool:
    """Whether a training's product is an adapter; otherwise it is a model."""
    from cai_scale.training.adapters import CONFIG

    return (product / CONFIG).is_file()


def with_adapter(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    """`model` with a saved LoRA adapter put on top, not merged."""
    from peft import PeftModel

    from cai_scale.training.adapters import adapter_shapes, check_adapter

    check_adapter(adapter)
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=False).eval()
    except LOADING_ERRORS as error:
        first = str(error).strip().split("\n")[0]
        raise IntegrityError(f"adapter {adapter} does not fit its model ({first})") from None
    check_adapter(adapter, adapter_shapes(adapted))
    return adapted


def check_weights(model: str, expected: Mapping[str, str], run: Path) -> None:
    """Complain about a base model whose files are not those that `run` was trained on.

    Raises:
        CaiError: the model cannot be found, or has other weights than `expected`.
    """
    check(model)
    if weights_sha256(model) != expected:
        raise IntegrityError(
            f"model {model} has other weights than {run} was trained on; restore them"
        )


def weights_sha256(model: str) -> dict[str, str]:
    """SHA-256 of each safetensors file of a model, by file name."""
    from huggingface_hub import snapshot_download

    source = resolve(model)
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors"]))
        except (OSError, ValueError) as error:
            raise _unloadable(model, error) from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingError(f"model {model} has no .safetensors file; choose one that has")
    return {file.name: sha256(file) for file in files}


def _load(factory: Any, model: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(resolve(model), trust_remote_code=False, **options)
    except LOADING_ERRORS as error:
        raise _unloadable(model, error) from None


def _unloadable(model: str, error: Exception) -> ConfigError:
    first = str(error).strip().split("\n")[0] or type(error).__name__
    return ConfigError(
        f"model {model} cannot be loaded ({first}); check the name, the folder's files, and the "
        f"connection to the hub"
    )


def _refuse_pickles(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
        raise MissingError(
            f"model folder {folder} holds {found} and no .safetensors file; save it with "
            f"save_pretrained, which writes safetensors"
        )
