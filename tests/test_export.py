"""The bundle of a tiny run: names, parity, hashes, and that the gates can fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cai_export import parity

from cai_scale.errors import GateError, IntegrityError
from cai_scale.records import sha256
from cai_scale.runtime import bundle as layout
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.generate import Graph
from processes import run_python


def axes(value: Any) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("variant", ["fp32", "q8"])
def test_the_graph_has_the_names_and_axes_of_the_contract(bundle: Path, variant: str) -> None:
    graph = onnx.load(str(bundle / layout.GRAPHS[variant]), load_external_data=False).graph
    past = ["batch_size", 2, "past_sequence_length", 16]
    present = ["batch_size", 2, "total_sequence_length", 16]
    layers = [f"{n}.{kind}" for n in range(2) for kind in ("key", "value")]
    assert {i.name: axes(i) for i in graph.input} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}": past for layer in layers},
    }
    assert {o.name: axes(o) for o in graph.output} == {
        "logits": ["batch_size", "sequence_length", 600],
        **{f"present.{layer}": present for layer in layers},
    }


def test_weights_lie_in_their_sidecar(bundle: Path) -> None:
    for graph in layout.GRAPHS.values():
        model = onnx.load(str(bundle / graph), load_external_data=False)
        places = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {Path(graph).name + "_data"}
        data = bundle / f"{graph}_data"
        assert data.stat().st_mode == (bundle / graph).stat().st_mode


def test_quantised_products_are_8_bit_and_the_graph_is_smaller(bundle: Path) -> None:
    model = onnx.load(str(bundle / layout.GRAPHS["q8"]), load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 14  # seven projections in each of two layers
    for node in products:
        settings = {a.name: a.i for a in node.attribute}
        assert (settings["bits"], settings["block_size"]) == (8, 32)
        assert settings.get("accuracy_level", 0) == 0
    sizes = [(bundle / f"{layout.GRAPHS[v]}_data").stat().st_size for v in ("q8", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]


def test_parity_holds_and_is_recorded(bundle: Path) -> None:
    found = json.loads((bundle / layout.PARITY).read_text())
    assert found["merge"]["max_abs_logit_delta"] <= 1e-3
    deltas = found["fp32"]["max_abs_logit_delta"]
    assert set(deltas) == {"alone", "left", "right"}
    for modes in deltas.values():
        assert set(modes) == {"prefill", "decode"}
        assert 0 < max(modes.values()) <= 1e-3
    assert found["q8"]["tokens"] >= 2000
    assert 0 < found["q8"]["kl"] <= 0.02
    assert found["q8"]["top1"] >= 0.95
    assert found["q8"]["alone_against_batch"] <= 1e-3


def test_the_manifest_names_every_file(bundle: Path) -> None:
    manifest = json.loads((bundle / layout.MANIFEST).read_text())
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {layout.MANIFEST, layout.MANIFEST_DIGEST}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert open_bundle(bundle).graph().name == "model_quantized.onnx"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_one_changed_byte_in_any_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    names = json.loads((bundle / layout.MANIFEST).read_text())["files"]
    assert len(names) >= 12
    for name in names:
        copy = Path(shutil.copytree(bundle, tmp_path / name.replace("/", "-")))
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(IntegrityError, match=f"{name} differs"):
            open_bundle(copy)


def test_a_changed_bundle_is_one_line_and_exit_code_2(copy: Path) -> None:
    data = copy / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    result = run_python(
        "-m", "cai_scale.runtime.cli", "--bundle", str(copy), "--prompt", "x", "--response", "y"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "onnx/model.onnx_data differs from what was exported" in result.stderr


def edit_manifest(copy: Path, **changes: Any) -> None:
    path = copy / layout.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 2}, "schema 2, expected 1"),
        ({"files": []}, "no proper 'files'"),
        ({"files": {}}, "does not list"),
        ({"variants": {"fp32": "onnx/other.onnx"}}, "does not list"),
        ({"constitution": "0" * 64}, "not the constitution"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    copy: Path, changes: dict[str, Any], said: str
) -> None:
    edit_manifest(copy, **changes)
    with pytest.raises(IntegrityError, match=said):
        open_bundle(copy)


def test_a_manifest_that_points_outside_or_at_a_link_is_refused(copy: Path) -> None:
    files = json.loads((copy / layout.MANIFEST).read_text())["files"]
    secret = copy.parent / "secret"
    secret.write_text("x")
    for name in ("../secret", str(secret)):
        edit_manifest(copy, files=files | {name: sha256(secret)})
        with pytest.raises(IntegrityError, match="points outside"):
            open_bundle(copy)
    edit_manifest(copy, files=files | {"link": sha256(secret)})
    (copy / "link").symlink_to(secret)
    with pytest.raises(IntegrityError, match="is a link"):
        open_bundle(copy)


def test_an_unreadable_manifest_is_refused(copy: Path) -> None:
    (copy / layout.MANIFEST).write_text("{")
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_bundle(copy)


@pytest.fixture(scope="module")
def merged(finished_run: Any) -> Any:
    """The trained model, merged here by peft alone."""
    from peft import PeftModel

    from cai_scale.training.models import load_model

    base = load_model(finished_run.settings()["model"], torch.float32)
    return PeftModel.from_pretrained(base, finished_run.adapter).merge_and_unload()


SEQUENCES = [list(range(5 + 40 * i, 20 + 47 * i)) for i in range(1, 8)]


def test_the_exact_gate_passes_the_true_model_and_fails_another(bundle: Path, merged: Any) -> None:
    import copy as copies

    graph = bundle / layout.GRAPHS["fp32"]
    assert parity.check_exact(graph, merged, SEQUENCES)["sequences"] == 7
    other = copies.deepcopy(merged)
    with torch.no_grad():  # the control: one weight of 150,000 moves
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 0.5
    with pytest.raises(GateError, match="differs from torch"):
        parity.check_exact(graph, other, SEQUENCES)


@pytest.mark.parametrize("fault", ["positions", "mask", "nan"])
def test_the_exact_gate_catches_wrong_padding(
    bundle: Path, merged: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Graphs with the usual defects: positions that count padding, a mask that is not used."""
    run = Graph.run

    def broken(self: Graph, tokens: Any, mask: Any, cache: Any) -> Any:
        if fault == "mask":
            return run(self, tokens, np.ones_like(mask), cache)
        logits, cache = run(self, tokens, mask, cache)
        if fault == "nan":
            logits[0, -1, 0] = np.nan
        elif tokens.shape[0] > 1:  # as if each row began at column 0
            width = mask.shape[1]
            positions = np.broadcast_to(np.arange(width), mask.shape)[:, -tokens.shape[1] :]
            values = self.session.run(
                ["logits"],
                {
                    "input_ids": tokens,
                    "attention_mask": mask,
                    "position_ids": positions * 3,
                    **{k: v[:, :, : width - tokens.shape[1]] for k, v in cache.items()},
                },
            )
            logits = values[0]
        return logits, cache

    monkeypatch.setattr(Graph, "run", broken)
    with pytest.raises(GateError):
        parity.check_exact(bundle / layout.GRAPHS["fp32"], merged, SEQUENCES)


def test_the_close_gate_needs_tokens_and_bounds(
    bundle: Path, merged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = bundle / layout.GRAPHS["q8"]
    with pytest.raises(GateError, match="tokens are too few"):
        parity.check_close(graph, merged, SEQUENCES[:2], "q8")
    many = SEQUENCES * 7
    assert parity.check_close(graph, merged, many, "q8")["tokens"] >= 2000
    for name, bound in (("MAX_KL", 1e-9), ("MIN_TOP1", 1.1)):
        monkeypatch.setattr(parity, name, bound)
        with pytest.raises(GateError, match="variant q8: KL"):
            parity.check_close(graph, merged, many, "q8")
        monkeypatch.undo()


def test_divergence_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    kl, top1 = parity.divergence(np.log(p)[None] + 3.0, np.log(q)[None] - 2.0)
    assert kl[0] == pytest.approx(0.25 * np.log(2))
    assert not top1[0]


def test_a_failed_export_leaves_nothing(
    finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_export import cli

    run = Path(
        shutil.copytree(
            finished_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")
        )
    )
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(parity, "MAX_DELTA", 1e-12)
    assert cli.main(["--merge-lora", "--run", str(run)]) == 1
    assert sorted(run.rglob("*")) == before
