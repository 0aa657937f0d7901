"""The graph of a run's current policy: what the runtime needs of a bundle, and no more."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from cai_scale.constitution import Constitution
from cai_scale.records import sha256, write_json
from cai_scale.runtime import bundle as layout
from cai_scale.training import models


def fusible(model: str) -> bool:
    """Whether there is a fused graph for the architecture of a model, by its name."""
    from .fuse import knows

    return knows(models.load_config(model))


def export_policy(
    model: str,
    product: Path | None,
    folder: Path,
    variants: Sequence[str],
    constitution: Constitution,
) -> None:
    """Export a model, or what a training made of it, into a folder that appears when complete.

    It has the fused graph alone where there is one, and no parity report: it answers in the run
    that made it and is no bundle for others.
    """
    from . import variants as graphs
    from . import weights
    from .bundle import write_model_files
    from .fuse import fuse
    from .graph import trace
    from .merge import merged_policy
    from .normalise import normalise

    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "onnx").mkdir(parents=True)
    merged = merged_policy(model, product)
    fused = fuse(merged.model)
    fp32 = {"graph": normalise(trace(merged.model))} if fused is None else {"fused": fused}
    written = graphs.write(aside, "fp32", fp32)
    files = {
        name: written if name == "fp32" else graphs.derive(aside, name, written)
        for name in variants
    }
    if "fp32" not in variants:
        for file in written.values():
            for path in (aside / file, weights.sidecar(aside / file)):
                path.unlink()
    first = next(iter(files[variants[0]].values()))
    write_model_files(aside, merged, aside / first)
    write_json(aside / layout.CONSTITUTION, constitution.data)
    manifest = {
        "schema": layout.SCHEMA,
        "constitution": constitution.sha256,
        "variants": {name: {"graph": found.get("fused"), **found} for name, found in files.items()},
        "default": variants[0],
        "files": {
            path.relative_to(aside).as_posix(): sha256(path)
            for path in sorted(aside.rglob("*"))
            if path.is_file()
        },
    }
    write_json(aside / layout.MANIFEST, manifest)
    aside.rename(folder)
