"""The bundle folder: its file names, and the check that it is the one that was exported."""

import hashlib
import json
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
# A variant's graphs, as the manifest names them: the contract by the names that readers of ONNX
# models use, and where there is one the fused graph, which has its weights in the same sidecar.
VARIANTS = {
    "fp32": {"graph": "onnx/model.onnx", "fused": "onnx/fused.onnx"},
    "fp16": {"graph": "onnx/model_fp16.onnx"},
    "q8": {"graph": "onnx/model_quantized.onnx", "fused": "onnx/fused_quantized.onnx"},
    "q4": {"graph": "onnx/model_q4.onnx", "fused": "onnx/fused_q4.onnx"},
}
WEIGHTS_SUFFIX = "_data"
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
        return self.path / self._variant(variant)["graph"]

    def fused(self, variant: str | None = None) -> Path | None:
        """The fused graph of a variant, for rows padded on the right; None where it has none.

        Raises:
            ConfigError: as of `graph`.
        """
        name = self._variant(variant).get("fused")
        return None if name is None else self.path / name

    def _variant(self, variant: str | None) -> Mapping[str, str]:
        variants = self.manifest["variants"]
        name = variant or self.manifest["default"]
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
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            raise refused(path, f"{MANIFEST} has no proper {key!r}")
    for name in (CONFIG, GENERATION, CONSTITUTION, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE):
        if name not in manifest["files"]:
            raise refused(path, f"{MANIFEST} does not list {name}")
    for variant, graphs in manifest["variants"].items():
        _check_variant(path, variant, graphs, manifest["files"])
    if manifest["default"] not in manifest["variants"]:
        raise refused(path, f"{MANIFEST} has no variant {manifest['default']!a}, its default")
    if manifest.get("scorer", "lexicon") not in SCORERS:
        raise refused(path, f"{MANIFEST} has no proper 'scorer'")
    return manifest


def _check_variant(path: Path, variant: str, graphs: Any, files: Mapping[str, str]) -> None:
    if not isinstance(graphs, dict) or not {"graph"} <= graphs.keys() <= {"graph", "fused"}:
        raise refused(path, f"{MANIFEST} has no proper variant {variant!a}")
    for graph in graphs.values():
        if not isinstance(graph, str) or graph not in files:
            raise refused(path, f"{MANIFEST} does not list {json.dumps(graph)}")
        if not graph.endswith(".onnx"):
            raise refused(path, f"{MANIFEST} has a variant {graph!a}, which is no .onnx file")
