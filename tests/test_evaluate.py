"""`cai-scale evaluate --bundle A --against B`: as a run evaluates itself, without torch."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cai_scale import constitution as constitutions
from cai_scale.cli import main
from cai_scale.records import read_json, read_jsonl, sha256, write_json
from cai_scale.runs import Run
from cai_scale.runtime.bundle import MANIFEST, TOKENIZER
from processes import run_python
from test_torch_free import BLOCK

BLOCK_TORCH = BLOCK.replace('"rich", "matplotlib", ', "")
OWN = ("schema", "method", "model", "trained_on", "seconds", "peak_memory_bytes")
OWN = (*OWN, "sampled_tokens", "trained_parameters")  # of a run, or of two bundles


@pytest.fixture(scope="module")
def bundles(
    finished_run: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """What a run has trained, and the base model, both in fp32."""
    from cai_export.policy import export_policy

    folder = tmp_path_factory.mktemp("bundles")
    constitution = constitutions.from_dict(read_json(finished_run.constitution))
    for name, product in (("after", finished_run.adapter), ("before", None)):
        export_policy(str(tiny_model), product, folder / name, ("fp32",), constitution)
    return folder / "after", folder / "before"


def flags(bundles: tuple[Path, Path], prompts: Path, output: Path) -> list[str]:
    after, before = map(str, bundles)
    asked = ["--prompts", str(prompts), "--output", str(output)]
    return ["evaluate", "--bundle", after, "--against", before, *asked]


@pytest.fixture(scope="module")
def compared(
    bundles: tuple[Path, Path], few_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """An evaluation in a process that cannot import torch."""
    run = Run(tmp_path_factory.mktemp("evaluations") / "one")
    code = BLOCK_TORCH + "from cai_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run_python("-c", code, *flags(bundles, few_prompts, run.path))
    assert (result.returncode, result.stderr) == (0, "")
    assert "Overall" in result.stdout and str(run.report) in result.stdout
    return run


def close(one: Any, other: Any) -> None:
    """Equal but for the rounding of another library's sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            close(one[key], other[key])
    elif isinstance(one, float) and other is not None:
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)
    else:
        assert one == other


def test_the_figures_are_those_of_the_run_itself(compared: Run, finished_run: Run) -> None:
    for when in ("before", "after"):
        assert compared.evaluation(when).read_text() == finished_run.evaluation(when).read_text()
    ours, theirs = (
        [row for _, row in read_jsonl(run.evaluation("measures"))]
        for run in (compared, finished_run)
    )
    assert len(ours) == len(theirs) == 20
    for row, other in zip(ours, theirs, strict=True):
        close(row, other)
    assert {row["kl"] for row in ours if row["when"] == "before"} <= {0, None}
    moved = [row["kl"] for row in ours if row["when"] == "after" and row["tokens"]]
    assert moved and min(moved) > 0
    summary, of_run = (
        {key: value for key, value in read_json(run.summary).items() if key not in OWN}
        for run in (compared, finished_run)
    )
    close(summary, of_run)


def test_the_other_way_round_the_difference_turns(
    bundles: tuple[Path, Path], few_prompts: Path, compared: Run, tmp_path: Path
) -> None:
    """The control: it matters which bundle is the base."""
    assert main(flags(bundles[::-1], few_prompts, tmp_path / "turned")) == 0
    turned, straight = (read_json(Run(p).summary) for p in (tmp_path / "turned", compared.path))
    assert turned["delta"]["overall"] == pytest.approx(-straight["delta"]["overall"], abs=2e-6)
    assert (turned["win"], turned["loss"]) == (straight["loss"], straight["win"])
    rows = [row for _, row in read_jsonl(Run(tmp_path / "turned").evaluation("measures"))]
    others = [row for _, row in read_jsonl(compared.evaluation("measures"))]
    assert [r["nll"] for r in rows[10:]] != [r["nll"] for r in others[:10]]  # under another base


def test_what_is_answered_is_kept(
    bundles: tuple[Path, Path], few_prompts: Path, compared: Run, tmp_path: Path
) -> None:
    run = Run(Path(shutil.copytree(compared.path, tmp_path / "copy")))
    summary = read_json(run.summary)
    run.evaluation("measures").unlink()
    run.summary.unlink()
    before = run.evaluation("before")
    marked = before.read_text().replace('"text": "', '"text": "kept ', 1)
    before.write_text(marked)
    assert main(flags(bundles, few_prompts, run.path)) == 0
    assert before.read_text() == marked
    again = read_json(run.summary)
    assert again["drift"]["before"]["words"] == pytest.approx(
        summary["drift"]["before"]["words"] + 0.1, abs=1e-6
    )
    assert again["drift"]["after"] == summary["drift"]["after"]


def test_another_evaluation_s_folder_is_refused(
    bundles: tuple[Path, Path],
    few_prompts: Path,
    compared: Run,
    finished_run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for given in (
        flags(bundles[::-1], few_prompts, compared.path),
        flags(bundles, few_prompts, finished_run.path),
        [*flags(bundles, few_prompts, compared.path), "--prompts", "train"],
    ):
        assert main(given) == 2
        assert "choose another folder" in capsys.readouterr().err
    missing = flags((bundles[0], few_prompts.parent), few_prompts, compared.path)
    assert main(missing) == 2
    assert "is no bundle" in capsys.readouterr().err


def test_other_tokens_have_no_kl_and_that_is_said(
    bundles: tuple[Path, Path],
    few_prompts: Path,
    compared: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = Path(shutil.copytree(bundles[1], tmp_path / "before"))
    with (before / TOKENIZER).open("a") as file:
        file.write("\n")
    manifest = read_json(before / MANIFEST)
    manifest["files"][TOKENIZER] = sha256(before / TOKENIZER)
    write_json(before / MANIFEST, manifest)
    run = Run(tmp_path / "out")
    assert main(flags((bundles[0], before), few_prompts, run.path)) == 0
    assert "different tokenizers: the KL" in capsys.readouterr().out
    rows = [row for _, row in read_jsonl(run.evaluation("measures"))]
    others = [row for _, row in read_jsonl(compared.evaluation("measures"))]
    assert {row["kl"] for row in rows} == {None}
    assert [row["nll"] for row in rows] == [row["nll"] for row in others]


def test_the_report_needs_no_run(compared: Run) -> None:
    page = compared.report.read_text("utf-8")
    assert "<html" in page and str(read_json(compared.summary)["model"]) in page
