"""The bundle folder: its file names, and the check that it is the one that was exported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cai_scale.constitution import Constitution
from cai_scale.constitution import from_dict as constitution_from_dict
from cai_scale.errors import ConfigError, DataError, IntegrityError, MissingError
from cai_scale.records import read_json, sha256

SCHEMA = 1
MANIFEST = "manifest.json"
README = "README.md"
CONFIG = "config.json"
GENERATION = "generation_config.json"
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
        if "reward" not in self.manifest:
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


def open_bundle(path: Path) -> Bundle:
    """Check every file of a bundle before any of them is used.

    Raises:
        MissingError: the folder is no bundle.
        IntegrityError: a file is missing, is a link, lies outside the folder, or differs from
            what was exported.
    """
    if not (path / MANIFEST).is_file():
        raise MissingError(
            f"{path} is no bundle: it has no {MANIFEST}; make one with 'cai-export --merge-lora'"
        )
    manifest = _read_manifest(path)
    for name, digest in manifest["files"].items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name:
            raise _refused(path, f"{name!r} points outside the folder")
        file = path / name
        if any(p.is_symlink() for p in (file, *file.parents) if p.is_relative_to(path)):
            raise _refused(path, f"{name} is a link")
        if not file.is_file():
            raise _refused(path, f"{name} is missing")
        if sha256(file) != digest:
            raise _refused(path, f"{name} differs from what was exported")
    bundle = Bundle(path, manifest)
    if bundle.constitution.sha256 != manifest["constitution"]:
        raise _refused(path, f"{CONSTITUTION} is not the constitution that the manifest names")
    return bundle


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / MANIFEST)
    except DataError as error:
        raise _refused(path, f"{MANIFEST} cannot be read ({error})") from None
    if manifest.get("schema") != SCHEMA:
        raise _refused(path, f"{MANIFEST} has schema {manifest.get('schema')!r}, expected {SCHEMA}")
    kinds = {"files": dict, "variants": dict, "default": str, "constitution": str}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise _refused(path, f"{MANIFEST} has no proper {key!r}")
    needed = [CONFIG, GENERATION, CONSTITUTION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE]
    needed += manifest["variants"].values()
    if "reward" in manifest:
        needed += _of_reward(path, manifest["reward"])
    for name in needed:
        if name not in manifest["files"]:
            raise _refused(path, f"{MANIFEST} does not list {json.dumps(name)}")
    return manifest


def _of_reward(path: Path, reward: Any) -> list[Any]:
    """The files that a reward model needs, by what the manifest says about it."""
    kinds = {"variants": dict, "default": str, "labels": list}
    if not isinstance(reward, dict) or not all(
        isinstance(reward.get(key), kind) for key, kind in kinds.items()
    ):
        raise _refused(path, f"{MANIFEST} has no proper 'reward'")
    names = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE)
    return [*(f"{REWARD}/{name}" for name in names), *reward["variants"].values()]


def _refused(path: Path, why: str) -> IntegrityError:
    return IntegrityError(f"bundle {path} refused: {why}; export it again")
