"""The bundle folder: its file names, and the check that it is the one that was exported."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_scale.constitution import Constitution
from cai_scale.constitution import from_dict as constitution_from_dict
from cai_scale.errors import ConfigError, DataError, IntegrityError, MissingError
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
CHAT = (TOKENIZER, TOKENIZER_CONFIG, TEMPLATE)
# A variant's graphs, as the manifest names them: the contract by the names that readers of ONNX
# models use, and where there is one the fused graph, which has its weights in the same sidecar.
VARIANTS = {
    "fp32": {"graph": "onnx/model.onnx", "fused": "onnx/fused.onnx"},
    "fp16": {"graph": "onnx/model_fp16.onnx"},
    "q8": {"graph": "onnx/model_quantized.onnx", "fused": "onnx/fused_quantized.onnx"},
    "q4": {"graph": "onnx/model_q4.onnx", "fused": "onnx/fused_q4.onnx"},
}
WEIGHTS_SUFFIX = "_data"
# The reward model, where the bundle has one: config, tokenizer and template as above, and graphs.
REWARD = "reward"
REWARD_VARIANTS = {
    name: {kind: f"{REWARD}/{file}" for kind, file in VARIANTS[name].items()}
    for name in ("fp32", "q8")
}
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
        """The contract graph of a variant; of the bundle's default one where none is named.

        Raises:
            ConfigError: the bundle has no such variant; those that it has are listed.
        """
        return self.path / self._variant(self.manifest, variant)["graph"]

    def fused(self, variant: str | None = None) -> Path | None:
        """The fused graph of a variant, for rows padded on the right; None where it has none.

        Raises:
            ConfigError: as of `graph`.
        """
        name = self._variant(self.manifest, variant).get("fused")
        return None if name is None else self.path / name

    def reward_graph(self, variant: str | None = None) -> Path:
        """The graph of a variant of the bundle's reward model, of its default one likewise: for
        rows padded on the right the fused one, where it has one.

        Raises:
            MissingError: the bundle has no reward model.
            ConfigError: the reward model has no such variant; those that it has are listed.
        """
        if self.manifest.get("scorer") != "reward":
            raise MissingError(
                f"bundle {self.path} has no reward model and scores with the lexicon; export one "
                f"with 'cai-export --merge-lora --reward DIR'"
            )
        graphs = self._variant(self.manifest["reward"], variant)
        return self.path / graphs.get("fused", graphs["graph"])

    def _variant(self, part: Mapping[str, Any], variant: str | None) -> Mapping[str, str]:
        variants, name = part["variants"], variant or part["default"]
        if name not in variants:
            raise ConfigError(
                f"bundle {self.path} has no variant {name!r}; choose one of: {', '.join(variants)}"
            )
        return dict(variants[name])


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


def unloadable(bundle: Bundle, error: Exception) -> IntegrityError:
    """The error for a file of a bundle that a library cannot read, though it is as exported."""
    reason = " ".join(str(error).split())[:200]
    return IntegrityError(
        f"bundle {bundle.path} cannot be loaded ({type(error).__name__}: {reason}); export it again"
    )


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
    _check_kinds(path, manifest, {"files": dict, "constitution": str})
    _check_files(path, manifest, [CONFIG, GENERATION, CONSTITUTION, *CHAT])
    _check_variants(path, manifest, manifest["files"])
    if manifest.get("scorer", "lexicon") not in SCORERS:
        raise refused(path, f"{MANIFEST} has no proper 'scorer'")
    if manifest.get("scorer") == "reward":
        _check_kinds(path, manifest, {"reward": dict})
        _check_kinds(path, manifest["reward"], {"labels": list})
        _check_files(path, manifest, [f"{REWARD}/{name}" for name in (CONFIG, *CHAT)])
        _check_variants(path, manifest["reward"], manifest["files"])
    return manifest


def _check_kinds(path: Path, part: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        if not isinstance(part.get(key), kind):
            raise refused(path, f"{MANIFEST} has no proper {key!r}")


def _check_files(path: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in manifest["files"]:
            raise refused(path, f"{MANIFEST} does not list {name}")


def _check_variants(path: Path, part: Mapping[str, Any], files: Mapping[str, str]) -> None:
    _check_kinds(path, part, {"variants": dict, "default": str})
    for variant, graphs in part["variants"].items():
        _check_variant(path, variant, graphs, files)
    if part["default"] not in part["variants"]:
        raise refused(path, f"{MANIFEST} has no variant {part['default']!a}, its default")


def _check_variant(path: Path, variant: str, graphs: Any, files: Mapping[str, str]) -> None:
    if not isinstance(graphs, dict) or not {"graph"} <= graphs.keys() <= {"graph", "fused"}:
        raise refused(path, f"{MANIFEST} has no proper variant {variant!a}")
    for graph in graphs.values():
        if not isinstance(graph, str) or graph not in files:
            raise refused(path, f"{MANIFEST} does not list {json.dumps(graph)}")
        if not graph.endswith(".onnx"):
            raise refused(path, f"{MANIFEST} has a variant {graph!a}, which is no .onnx file")
