"""`cai-scale verify`: what is intact passes; one changed byte, or one changed meaning, does not."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cai_scale import chain, cli
from cai_scale.records import checksums, json_text, read_json, sha256
from cai_scale.runs import Run
from cai_scale.runtime import bundle as layout
from cai_scale.verify import Link, verify_bundle, verify_run


@pytest.fixture
def run(finished_run: Any, bundle: Path, tmp_path: Path) -> Run:
    """A copy of the run with its bundle; what other tests exported elsewhere is not at hand."""
    copy = Run(Path(shutil.copytree(finished_run.path, tmp_path / "run")))
    inside = {name: d for name, d in copy.exported().items() if not name.startswith("..")}
    copy.exports.write_text(checksums(inside), "utf-8")
    return copy


@pytest.fixture
def bare(finished_run: Any, bundle: Path, tmp_path: Path) -> Run:
    """A copy of the run as it was before the export."""
    left_out = shutil.ignore_patterns("bundle", "exports.sha256")
    return Run(Path(shutil.copytree(finished_run.path, tmp_path / "run", ignore=left_out)))


def broken(links: list[Link]) -> dict[str, str]:
    return {link.name: link.said for link in links if link.ok is False}


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON or JSON Lines file says."""
    if path.suffix == ".json":
        path.write_text(json_text(change(read_json(path))), encoding="utf-8")
        return
    rows = change([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def forge(run: Run) -> None:
    """Rewrite the chain to fit the files as they are now: what a careful forger would do."""
    stages = {
        name: {"read": chain.digests(run, s.reads), "wrote": chain.digests(run, s.writes)}
        for name, s in chain.stages(run).items()
    }
    run.chain.write_text(json_text({"schema": 1, "stages": stages}), encoding="utf-8")


def verify(*arguments: object) -> int:
    """The command's exit code."""
    return cli.main(["verify", *map(str, arguments)])


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def places(folder: Path, count: int) -> list[tuple[Path, int, int]]:
    """(file, offset, what to flip): `count` bytes of all bytes, and one in each file."""
    numbers = random.Random(0)
    files = [path for path in files_of(folder) if path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    chosen = numbers.choices(files, sizes, k=count) + files
    return [(f, numbers.randrange(f.stat().st_size), numbers.randrange(1, 256)) for f in chosen]


def flip(file: Path, offset: int, mask: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ mask]))


def test_an_intact_run_and_its_bundle_pass(run: Run) -> None:
    links = verify_run(run)
    assert broken(links) == {}
    said = {link.name: link.said for link in links}
    assert list(said) == [
        *("chain", "start", "evaluate before", "rollout", "revise", "pair", "train"),
        *("evaluate after", "measure", "summary", "other files", "exports"),
        *("bundle: manifest", "bundle: files", "bundle: run"),
    ]
    assert sha256(run.chain) in said["chain"]
    assert "80 answers" in said["rollout"]
    assert f"{len(run.round(1).pairs.read_text('utf-8').splitlines())} pairs" in said["pair"]
    assert "measures of 20 answers" in said["measure"]
    assert "answers to 10 prompts scored again" in said["summary"]


def test_every_changed_byte_of_a_run_is_caught(run: Run) -> None:
    chosen = places(run.path, 200)
    assert {"summary.json", "chain.json", "exports.sha256"} <= {file.name for file, _, _ in chosen}
    missed = []
    for file, offset, mask in chosen:
        flip(file, offset, mask)
        if verify(run.path) != 1:
            missed.append((file, offset, mask))
        flip(file, offset, mask)
    assert missed == []
    assert broken(verify_run(run)) == {}  # the control: every byte was put back


def test_every_changed_byte_of_a_bundle_is_caught_without_its_run(run: Run) -> None:
    alone = Path(shutil.move(run.bundle, run.path.parent / "alone"))
    missed = []
    for file, offset, mask in places(alone, 200):
        flip(file, offset, mask)
        if verify(alone) != 1:
            missed.append((file, offset, mask))
        flip(file, offset, mask)
    assert missed == []
    assert broken(verify_bundle(alone)) == {}


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("config.json", "start"),
        ("prompts/heldout.jsonl", "start"),
        ("evaluation/before.jsonl", "evaluate before"),
        ("rounds/1/rollouts.jsonl", "rollout"),
        ("rounds/1/revisions.jsonl", "revise"),
        ("rounds/1/audit.json", "pair"),
        ("adapter/adapter_model.safetensors", "train"),
        ("metrics.jsonl", "train"),
        ("rounds/1/references.json", "train"),
        ("evaluation/measures.jsonl", "measure"),
        ("costs.json", "summary"),
        ("report.html", "summary"),
        ("summary.json", "summary"),
    ],
)
def test_the_broken_link_is_named(bare: Run, name: str, link: str) -> None:
    flip(bare.path / name, (bare.path / name).stat().st_size // 2, 1)
    assert broken(verify_run(bare)) == {link: f"{name} differs from what was written"}
    (bare.path / name).unlink()
    assert broken(verify_run(bare))[link] == f"{name} is missing"


def test_an_unknown_file_is_broken_and_removed_checkpoints_are_not(bare: Run) -> None:
    shutil.rmtree(bare.checkpoints)
    links = verify_run(bare)
    assert broken(links) == {}
    assert "checkpoints since removed" in next(link.said for link in links if link.name == "train")
    (bare.path / ".summary.json.17").touch()  # what a killed start left
    assert broken(verify_run(bare)) == {}
    (bare.round(1).path / "pairs-2.jsonl").write_text("{}\n")
    assert list(broken(verify_run(bare))) == ["other files"]


def swap(rows: list[Any]) -> list[Any]:
    rows[0]["chosen"], rows[0]["rejected"] = rows[0]["rejected"], rows[0]["chosen"]
    return rows


def of_another_model(references: dict[str, Any]) -> dict[str, Any]:
    references["key"]["weights"]["model.safetensors"] = "0" * 64
    return references


def in_another_order(references: dict[str, Any]) -> dict[str, Any]:
    return references | {"pairs": references["pairs"][::-1]}


def text_of(row: int, text: str) -> Callable[[list[Any]], list[Any]]:
    def change(rows: list[Any]) -> list[Any]:
        rows[row]["text"] = text
        return rows

    return change


def raised(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(summary: dict[str, Any]) -> dict[str, Any]:
        if key == "ci95":
            summary["delta"]["ci95"] = [0.01, 0.05]
        elif key == "after":
            summary["after"]["overall"] += 0.00001
        elif key == "seconds":
            summary["seconds"]["train"] = 1.0
        else:
            summary[key] = summary[key] + 1 if isinstance(summary[key], int) else "other"
        return summary

    return change


@pytest.mark.parametrize(
    ("name", "change", "link", "said"),
    [
        ("rounds/1/pairs.jsonl", swap, "pair", "the pair of prompt"),
        ("rounds/1/pairs.jsonl", lambda rows: rows[1:], "pair", "pairs"),
        ("rounds/1/audit.json", lambda a: a | {"mean_gap": 0.5}, "pair", "audit.json: mean_gap"),
        (
            "rounds/1/refused.jsonl",
            lambda rows: [*rows, {"prompt_id": "x", "refused": "under_margin", "why": "no gap"}],
            "pair",
            "refused.jsonl has",
        ),
        ("rounds/1/rollouts.jsonl", lambda rows: rows[1:], "rollout", "answers"),
        ("rounds/1/revisions.jsonl", lambda rows: rows[::-1], "revise", "answers"),
        ("evaluation/after.jsonl", text_of(0, "a c n a c n"), "summary", "summary.json"),
        ("evaluation/after.jsonl", text_of(0, 7), "summary", "not as it was written"),  # type: ignore[arg-type]
        ("evaluation/before.jsonl", lambda rows: rows[::-1], "evaluate before", "answers"),
        ("evaluation/measures.jsonl", lambda rows: rows[::-1], "measure", "does not hold"),
        ("evaluation/measures.jsonl", lambda rows: rows[1:], "measure", "does not hold"),
        ("rounds/1/references.json", of_another_model, "train", "key: weights: model.safetensors"),
        ("rounds/1/references.json", in_another_order, "train", "of other pairs"),
        ("prompts/train.jsonl", lambda rows: rows[1:], "start", "prompts/train.jsonl"),
        ("constitution.json", lambda c: c | {"name": "other"}, "start", "constitution.json"),
        ("summary.json", raised("ci95"), "summary", "delta: ci95 is 0.01"),
        ("summary.json", raised("after"), "summary", "after: overall"),
        ("summary.json", raised("win"), "summary", "win"),
        ("summary.json", raised("model"), "summary", "model is 'other'"),
        ("summary.json", raised("seconds"), "summary", "seconds: train"),
    ],
)
def test_a_changed_meaning_is_caught_though_all_hashes_fit(
    bare: Run, name: str, change: Callable[[Any], Any], link: str, said: str
) -> None:
    forge(bare)
    assert broken(verify_run(bare)) == {}  # the control: the forger's chain is a good one
    rewrite(bare.path / name, change)
    forge(bare)
    found = broken(verify_run(bare))
    assert list(found) == [link]
    assert said in found[link]


def test_every_byte_of_the_chain_counts(bare: Run) -> None:
    """Names and layout too, not the hashes alone."""
    text = bare.chain.read_bytes()
    marks = (
        b'"schema"',
        b'"summary"',
        b'"read"',
        b'"wrote"',
        b'"train"',
        b"metrics",
        b"\n  ",
        b"}",
    )
    for mark in marks:
        offset = text.index(mark) + 1 if len(mark) > 1 else text.rindex(mark)
        flip(bare.chain, offset, 1)
        assert verify(bare.path) == 1, mark
        flip(bare.chain, offset, 1)
    assert verify(bare.path) == 0


def test_hashes_kept_elsewhere_catch_what_was_rewritten_to_fit(bare: Run) -> None:
    """Sampled answers cannot be worked out again; only the chain's own hash holds them."""
    kept = sha256(bare.chain)
    rewrite(bare.metrics, lambda rows: rows[:-1])
    forge(bare)
    assert broken(verify_run(bare)) == {}
    assert list(broken(verify_run(bare, expected=kept))) == ["chain"]


def test_a_stage_that_read_something_else_is_named(bare: Run) -> None:
    def other(record: dict[str, Any]) -> dict[str, Any]:
        record["stages"]["train"]["read"]["rounds/1/pairs.jsonl"] = "0" * 64
        return record

    rewrite(bare.chain, other)
    assert broken(verify_run(bare)) == {
        "train": "it read another rounds/1/pairs.jsonl than was written"
    }


def test_a_bundle_changed_with_its_manifest_is_caught_by_the_run(run: Run) -> None:
    card, manifest = run.bundle / layout.README, run.bundle / layout.MANIFEST
    card.write_text("The best model.\n")
    rewrite(manifest, lambda m: m | {"files": {**m["files"], layout.README: sha256(card)}})
    beside = run.bundle / layout.MANIFEST_DIGEST
    beside.write_text(checksums({layout.MANIFEST: sha256(manifest)}))
    assert broken(verify_bundle(run.bundle)) == {}
    assert list(broken(verify_bundle(run.bundle, run=run))) == ["run"]
    assert list(broken(verify_run(run))) == ["exports", "bundle: run"]
    expected = "0" * 64
    assert list(broken(verify_bundle(run.bundle, expected=expected))) == ["manifest"]


def test_a_bundle_of_another_run_a_lost_and_an_unknown_file(run: Run, bare_summary: str) -> None:
    run.summary.write_text(bare_summary)
    assert "another summary.json" in broken(verify_bundle(run.bundle, run=run))["run"]
    (run.bundle / "onnx" / "extra.onnx").touch()
    assert "onnx/extra.onnx" in broken(verify_bundle(run.bundle))["files"]
    shutil.rmtree(run.bundle)
    assert "bundle/manifest.json is missing" in broken(verify_run(run))["exports"]


@pytest.fixture
def bare_summary(finished_run: Any) -> str:
    return str(finished_run.summary.read_text("utf-8")) + "\n"


def test_the_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    digest = sha256(run.chain)
    assert verify(run.path, "--expect-sha256", digest) == 0
    assert verify(run.bundle) == 0
    shown, complaints = capsys.readouterr()
    assert complaints == ""
    assert digest in shown
    assert "made from" in shown
    flip(run.round(1).pairs, 10, 1)
    assert verify(run.path) == 1
    shown, complaints = capsys.readouterr()
    assert complaints.splitlines() == [
        f"error: {run.path}: the link 'pair' is broken: rounds/1/pairs.jsonl differs from what "
        f"was written; restore the folder from a copy, or make it again"
    ]
    assert "pair              BROKEN" in shown
    assert verify(run.bundle, "--expect-sha256", "0" * 64) == 1
    assert "expected 0000" in capsys.readouterr().err


def test_a_finished_run_that_lost_its_summary_is_broken(
    bare: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    bare.summary.unlink()
    assert verify(bare.path) == 1
    assert "'summary' is broken: summary.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: run.chain.unlink(), "has no chain.json"),
        (lambda run: (run.chain.unlink(), run.summary.unlink()), "holds no finished run"),
        (lambda run: shutil.rmtree(run.path), "neither a run nor a bundle"),
    ],
)
def test_what_cannot_be_verified_is_said(
    bare: Run, capsys: pytest.CaptureFixture[str], change: Callable[[Run], Any], said: str
) -> None:
    change(bare)
    assert verify(bare.path) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert len(complaint.splitlines()) == 1


def test_flags_that_do_not_fit(bare: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(bare.path, "--expect-sha256", "12") == 2
    assert "64 hexadecimal digits" in capsys.readouterr().err
    assert verify(bare.path, "--run", bare.path) == 2
    assert "--run belongs to a bundle" in capsys.readouterr().err
