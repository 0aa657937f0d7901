"""Write the bundle's files around its graphs."""

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cai_scale.constitution import Constitution
from cai_scale.errors import ConfigError
from cai_scale.evaluation.protocol import DECODING
from cai_scale.records import checksums, read_json, sha256, write_json
from cai_scale.runs import Run, versions
from cai_scale.runtime import bundle as layout
from cai_scale.training.aliases import ALIASES

from .genai import genai_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .merge import Merged
    from .variants import Variant

LIBRARIES = (
    *("cai-scale", "torch", "transformers", "peft"),
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-genai"),
)
DATA = {"train": "prompts", "heldout": "eval_prompts"}  # settings of a run, by their use
UNLIMITED = 10**9  # tokenizers that know no bound name a number above this


def write_model_files(folder: Path, merged: "Merged", graph: Path) -> None:
    """config, generation_config, genai_config, tokenizer and chat template, for every reader.

    Args:
        folder: holds the graphs already.
        graph: what onnxruntime-genai loads where it is told no other.
    """
    model, tokenizer = merged.model, merged.tokenizer
    context = context_length(model.config, tokenizer)
    write_config(folder, model, context)
    ends = model.generation_config.eos_token_id
    settings = {
        "bos_token_id": model.generation_config.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id if ends is None else ends,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": DECODING.temperature,
        "top_p": DECODING.top_p,
        "top_k": DECODING.top_k,
        "max_new_tokens": DECODING.max_new_tokens,
    }
    write_json(folder / layout.GENERATION, settings)
    write_json(folder / layout.GENAI, genai_config(graph, model.config, settings, context))
    write_tokenizer(folder, tokenizer)


def write_config(folder: Path, model: "PreTrainedModel", context: int) -> None:
    """The model's configuration, as readers without its class need it.

    Args:
        folder: holds the graphs already.
        context: the longest text in tokens.
    """
    config = {
        key: value for key, value in model.config.to_dict().items() if not key.startswith("_")
    }
    config["architectures"] = [type(model).__name__]
    # Some architectures keep it under a name of their own (GPT-2: n_positions).
    config["max_position_embeddings"] = context
    config["transformers.js_config"] = {"use_external_data_format": sidecars(folder)}
    write_json(folder / layout.CONFIG, _plain(config))


def write_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """The tokenizer and its chat template, the latter in both of its places."""
    tokenizer.save_pretrained(folder)
    (folder / layout.TEMPLATE).write_text(tokenizer.chat_template, "utf-8")
    described = read_json(folder / layout.TOKENIZER_CONFIG)
    # The class that every version of transformers knows.
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    described["chat_template"] = tokenizer.chat_template
    described["model_input_names"] = ["input_ids", "attention_mask"]  # the graph takes no others
    for key in ("backend", "is_local", "local_files_only", "name_or_path"):
        described.pop(key, None)
    write_json(folder / layout.TOKENIZER_CONFIG, described)


def context_length(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> int:
    """The longest prompt and answer together, in tokens, as the model or its tokenizer says.

    Raises:
        ConfigError: neither says.
    """
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    found = [getattr(config, name, None) for name in names]
    for length in [*found, tokenizer.model_max_length]:
        if isinstance(length, int) and 0 < length < UNLIMITED:
            return length
    raise ConfigError(
        f"the {config.model_type} model has no context length; set max_position_embeddings in its "
        f"config.json"
    )


def sidecars(folder: Path) -> dict[str, int]:
    """The graphs whose weights lie in one file beside them, as transformers.js must be told."""
    graphs = sorted((folder / "onnx").glob("*.onnx"))
    return {g.name: 1 for g in graphs if g.with_name(g.name + layout.WEIGHTS_SUFFIX).is_file()}


def write_card(
    folder: Path,
    run: Run,
    constitution: Constitution,
    parity: Mapping[str, Any],
    variants: Sequence["Variant"],
) -> None:
    """The model card: where the model comes from, what was measured, what it is not good for."""
    environment = Environment(
        loader=PackageLoader("cai_export", "."), undefined=StrictUndefined, trim_blocks=True
    )
    settings = run.settings()
    base, licence = _base_model(settings["model"])
    text = environment.get_template("card.md.jinja").render(
        summary=read_json(run.summary), config=read_json(run.config), constitution=constitution,
        parity=parity, variants=variants, run=run.path.name, base=base, licence=licence,
        data={role: _file_name(settings[key]) for role, key in DATA.items()},
    )  # fmt: skip
    (folder / layout.README).write_text(text, "utf-8")


def _file_name(source: str) -> str:
    """Of a data set: a path says where it lies on one machine."""
    return Path(source).name if Path(source).suffix else source


def _base_model(model: str) -> tuple[str, str | None]:
    """The public name of a model and its licence, where it is known: a folder's is its name."""
    import yaml

    alias = ALIASES.get(model)
    if alias is not None:
        return alias.repository, alias.licence or None
    if not Path(model).is_dir():
        return model, None
    card = Path(model) / "README.md"
    licence = None
    if card.is_file() and (found := re.match(r"---\n(.*?)\n---", card.read_text("utf-8"), re.S)):
        with contextlib.suppress(yaml.YAMLError, AttributeError):
            licence = yaml.safe_load(found[1]).get("license")
    return Path(model).name, licence if isinstance(licence, str) else None


def write_manifest(
    folder: Path,
    run: Run,
    constitution: Constitution,
    variants: Mapping[str, Mapping[str, str]],
    default: str,
    reward: Mapping[str, Any] | None = None,
) -> str:
    """Name every file with its SHA-256, last of all; return the manifest's own.

    Args:
        variants: by name, the files of their graphs, as in `layout.VARIANTS`.
        default: the variant that is used where none is named.
        reward: what the manifest says about the bundle's reward model, where it has one.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    config = read_json(run.config)
    manifest = {
        "schema": layout.SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": config["settings"]["model"],
        "weights": config["weights"],
        "run": {"name": run.path.name, "summary": sha256(run.summary), "chain": _chain(run)},
        "constitution": constitution.sha256,
        "variants": variants,
        "default": default,
        "scorer": "lexicon" if reward is None else "reward",
        **({} if reward is None else {"reward": reward}),
        "versions": versions(*LIBRARIES),
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
    }
    write_json(folder / layout.MANIFEST, manifest)
    digest = sha256(folder / layout.MANIFEST)
    text = checksums({layout.MANIFEST: digest})
    (folder / layout.MANIFEST_DIGEST).write_text(text, "utf-8", newline="\n")
    return digest


def _chain(run: Run) -> str | None:
    """Older runs have none."""
    return sha256(run.chain) if run.chain.is_file() else None


def _plain(value: Any) -> Any:
    """Only what JSON can say: a config may hold dtypes and infinities."""
    return json.loads(json.dumps(value, default=lambda other: str(other).removeprefix("torch.")))
