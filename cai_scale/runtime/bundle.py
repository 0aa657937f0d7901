"""The bundle folder: its file names, and the check that it is the one that was exported."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_scale.constitution import Constitution
from cai_scale.constitution import from_dict as constitution_from_dict
from cai_scale.errors import ConfigError, DataError, MissingError
from cai_scale.records import parse_object, read_json
from cai_scale.runtime.integrity import check, refused

SCHEMA = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"  # beside it, as sha256sum reads it
README = "README.md"
CONFIG = "config.json"
GENERATION = "generation_config.json"
GENAI = "genai_config.json"  # how onnxruntime-genai reads the graph; ours does not need it
CONSTITUTION = "constitution.json"
PARITY = "parity.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# Variants by the names that readers of ONNX models use; a graph's weights lie beside it.
GRAPHS = {"fp32": "onnx/model.onnx", "q8": "onnx/model_quantized.onnx"}
WEIGHTS_SUFFIX = "_data"
# The reward model, where the bundle has one: config, tokenizer and template as above, and graphs.
REWARD = "reward"
REWARD_GRAPHS = {variant: f"{REWARD}/{graph}" for variant, graph in GRAPHS.items()}
SCORERS = ("lexicon", "reward")  # what a bundle scores with


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every listed file has been checked against the manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def constitution(self) -> Constitution:
        return constitution_from_dict(read_json(self.path / CONSTITUTION), CONSTITUTION)

    def json(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name)

    def graph(self, variant: str | None = None) -> Path:
        """The graph of a variant; of the bundle's default one where none is named.

        Raises:
            ConfigError: the bundle has no such variant; those that it has are listed.
        """
        return self._graph(self.manifest, variant)

    def reward_graph(self, variant: str | None = None) -> Path:
        """The graph of a variant of the bundle's reward model; of its default one likewise.

        Raises:
            MissingError: the bundle has no reward model.
            ConfigError: the reward model has no such variant; those that it has are listed.
        """
        if self.manifest.get("scorer") != "reward":
            raise MissingError(
                f"bundle {self.path} has no reward model and scores with the lexicon; export one "
                f"with 'cai-export --merge-lora --reward DIR'"
            )
        return self._graph(self.manifest["reward"], variant)

    def _graph(self, part: Mapping[str, Any], variant: str | None) -> Path:
        variants, name = part["variants"], variant or part["default"]
        if name not in variants:
            raise ConfigError(
                f"bundle {self.path} has no variant {name!r}; choose one of: {', '.join(variants)}"
            )
        return self.path / variants[name]


def open_bundle(path: Path, expect_sha256: str | None = None) -> Bundle:
    """Check every file of a bundle before any of them is used.

    Args:
        expect_sha256: the SHA-256 of the manifest, in hexadecimal, as the export printed it. It
            pins the whole bundle: without it, files changed together with the manifest pass.

    Raises:
        MissingError: the folder is no bundle.
        IntegrityError: the manifest is another one; a file is missing, is a link or a pickle,
            lies outside the folder, or differs from what was exported.
    """
    if not (path / MANIFEST).is_file():
        raise MissingError(
            f"{path} is no bundle: it has no {MANIFEST}; make one with 'cai-export --merge-lora'"
        )
    manifest = _read_manifest(path, expect_sha256)
    check(path, manifest["files"])
    bundle = Bundle(path, manifest)
    if bundle.constitution.sha256 != manifest["constitution"]:
        raise refused(path, f"{CONSTITUTION} is not the constitution that the manifest names")
    return bundle


def _read_manifest(path: Path, expect_sha256: str | None) -> dict[str, Any]:
    try:
        content = (path / MANIFEST).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if expect_sha256 is not None and found != expect_sha256.strip().lower():
            raise refused(path, f"{MANIFEST} has the SHA-256 {found}, expected {expect_sha256}")
        manifest = parse_object(content)
    except (OSError, DataError) as error:
        raise refused(path, f"{MANIFEST} cannot be read ({error})") from None
    if manifest.get("schema") != SCHEMA:
        raise refused(path, f"{MANIFEST} has schema {manifest.get('schema')!r}, expected {SCHEMA}")
    kinds = {"files": dict, "variants": dict, "default": str, "constitution": str}
    _check_kinds(path, manifest, kinds)
    scorer = manifest.get("scorer", "lexicon")
    if scorer not in SCORERS:
        raise refused(path, f"{MANIFEST} has no proper 'scorer'")
    needed = [CONFIG, GENERATION, CONSTITUTION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE]
    needed += _graphs(path, manifest)
    if scorer == "reward":
        _check_kinds(path, manifest, {"reward": dict})
        reward = manifest["reward"]
        _check_kinds(path, reward, {"variants": dict, "default": str, "labels": list})
        needed += [f"{REWARD}/{n}" for n in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE)]
        needed += _graphs(path, reward)
    for name in needed:
        if name not in manifest["files"]:
            raise refused(path, f"{MANIFEST} does not list {name!a}")
    return manifest


def _check_kinds(path: Path, part: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(part.get(key), kind):
            raise refused(path, f"{MANIFEST} has no proper {key!r}")


def _graphs(path: Path, part: Mapping[str, Any]) -> list[str]:
    """The graphs of a part's variants, whose default must be one of them."""
    for graph in part["variants"].values():
        if not isinstance(graph, str) or not graph.endswith(".onnx"):
            raise refused(path, f"{MANIFEST} has a variant {graph!a}, which is no .onnx file")
    if part["default"] not in part["variants"]:
        raise refused(path, f"{MANIFEST} has no variant {part['default']!a}, its default")
    return list(part["variants"].values())
