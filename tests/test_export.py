"""The bundle of a tiny run: names, parity, hashes, and that the gates can fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from cai_export import parity

from cai_scale.errors import IntegrityError
from cai_scale.records import sha256
from cai_scale.runtime import bundle as layout
from cai_scale.runtime.bundle import open_bundle
from processes import run_python


def axes(value: Any) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("variant", ["fp32", "q8"])
def test_the_graph_has_the_names_and_axes_of_the_contract(bundle: Path, variant: str) -> None:
    graph = onnx.load(
        str(bundle / layout.VARIANTS[variant]["graph"]), load_external_data=False
    ).graph
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


def test_weights_lie_in_one_sidecar(bundle: Path) -> None:
    for graphs in json.loads((bundle / layout.MANIFEST).read_text())["variants"].values():
        sidecar = bundle / f"{graphs['graph']}_data"
        for graph in graphs.values():
            model = onnx.load(str(bundle / graph), load_external_data=False)
            places = {
                entry.value
                for tensor in model.graph.initializer
                for entry in tensor.external_data
                if entry.key == "location"
            }
            assert places == {sidecar.name}
            assert sidecar.stat().st_mode == (bundle / graph).stat().st_mode
            assert b"/" not in b"".join(n.doc_string.encode() for n in model.graph.node)
            assert not any(node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize("kind", ["graph", "fused"])
def test_quantised_products_are_8_bit_and_the_graph_is_smaller(bundle: Path, kind: str) -> None:
    graph = bundle / layout.VARIANTS["q8"][kind]
    nodes = onnx.load(str(graph), load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(products) == 15  # seven projections in each of two layers, and the head
    assert [node.op_type for node in nodes].count("GatherBlockQuantized") == 1
    for node in products:
        settings = {a.name: a.i for a in node.attribute}
        assert (settings["bits"], settings["block_size"]) == (8, 32)
        assert settings["accuracy_level"] == 4
    sizes = [
        (bundle / f"{layout.VARIANTS[v]['graph']}_data").stat().st_size for v in ("q8", "fp32")
    ]
    assert sizes[0] < 0.45 * sizes[1]


def test_parity_holds_and_is_recorded(bundle: Path) -> None:
    found = json.loads((bundle / layout.PARITY).read_text())
    assert found["merge"]["max_abs_logit_delta"] <= 1e-3
    assert found["tokens"] >= 2000
    assert found["variants"].keys() == {"fp32", "q8"}
    for name, graphs in found["variants"].items():
        assert graphs.keys() == {"graph", "fused"}
        for kind, figures in graphs.items():
            deltas = figures["max_abs_logit_delta"]
            assert deltas.keys() == {"alone", "right"} | ({"left"} if kind == "graph" else set())
            assert all(modes.keys() == {"prefill", "decode"} for modes in deltas.values())
            worst = max(delta for modes in deltas.values() for delta in modes.values())
            change = figures["sequence_log_probability"]
            assert 0 <= figures["kl"] <= figures["kl_max"]
            assert 0 < change["mean"] <= change["max"]
            if name == "fp32":
                assert 0 < worst <= 1e-3 and change["max"] <= 1e-3 and figures["top1"] == 1
            else:
                assert figures["kl"] <= 0.02 and figures["top1"] >= 0.9
    assert found["variants"]["q8"]["fused"]["alone_against_batch"] <= 1e-3


def test_the_manifest_names_every_file(bundle: Path) -> None:
    manifest = json.loads((bundle / layout.MANIFEST).read_text())
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {layout.MANIFEST, layout.MANIFEST_DIGEST}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert manifest["variants"] == {v: layout.VARIANTS[v] for v in ("fp32", "q8")}
    opened = open_bundle(bundle)
    assert opened.graph().name == "model_quantized.onnx"
    fused = opened.fused("fp32")
    assert fused is not None and fused.name == "fused.onnx"


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
        ({"variants": {"fp32": {"graph": "onnx/other.onnx"}}}, "does not list"),
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
