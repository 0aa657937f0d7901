"""The chain of a run: what is recorded when, and what an earlier record withstands."""

from pathlib import Path

import pytest

from cai_scale import chain
from cai_scale.errors import DataError
from cai_scale.records import sha256
from cai_scale.runs import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    for file in (run.config, run.prompts("train"), run.prompts("heldout"), run.constitution):
        file.parent.mkdir(exist_ok=True)
        file.write_text(file.name)
    run.round(1).path.mkdir(parents=True)
    return run


def roll_out(run: Run, text: str) -> None:
    with chain.recording(run, "rollout"):
        run.round(1).rollouts.write_text(text)


def test_a_stage_is_recorded_with_what_it_read_and_wrote(run: Run) -> None:
    roll_out(run, "answers")
    assert chain.read(run) == {
        "rollout": {
            "read": {
                "config.json": sha256(run.config),
                "prompts/train.jsonl": sha256(run.prompts("train")),
            },
            "wrote": {"rounds/1/rollouts.jsonl": sha256(run.round(1).rollouts)},
        }
    }


def test_what_a_stage_read_is_what_lay_there_when_it_began(run: Run) -> None:
    before = sha256(run.config)
    with chain.recording(run, "rollout"):
        run.config.write_text("changed meanwhile")
    assert chain.read(run)["rollout"]["read"]["config.json"] == before


def test_a_record_is_kept_while_its_files_are_there(run: Run) -> None:
    """Or a second start would record as right what was changed between the two."""
    roll_out(run, "answers")
    first = chain.read(run)
    run.round(1).rollouts.write_text("other answers")
    with chain.recording(run, "rollout"):
        pass
    assert chain.read(run) == first
    run.round(1).rollouts.unlink()  # the control: a stage that is run again is recorded again
    roll_out(run, "other answers")
    assert chain.read(run) != first


def test_a_stage_that_fails_is_not_recorded(run: Run) -> None:
    with pytest.raises(ValueError, match="no"), chain.recording(run, "rollout"):
        raise ValueError("no")
    assert chain.read(run) == {}


def test_the_summary_is_written_after_its_own_record(run: Run) -> None:
    roll_out(run, "answers")
    digest = chain.finish(run, {"n": 1})
    assert digest == sha256(run.chain)
    recorded = chain.read(run)
    assert list(recorded) == list(chain.stages(run))
    assert recorded["summary"]["wrote"] == {"summary.json": sha256(run.summary)}
    assert run.summary.read_text() == '{\n  "n": 1\n}\n'


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"stages": {"rollout": {}}}'])
def test_a_damaged_chain_is_not_continued(run: Run, text: str) -> None:
    run.chain.write_text(text)
    with pytest.raises(DataError, match=r"chain\.json"):
        chain.read(run)


def test_exports_are_kept_one_a_place(run: Run) -> None:
    run.keep_export(run.bundle / "manifest.json", "0" * 64)
    run.keep_export(run.path.parent / "other" / "manifest.json", "1" * 64)
    run.keep_export(run.bundle / "manifest.json", "2" * 64)
    assert run.exported() == {
        "../other/manifest.json": "1" * 64,
        "bundle/manifest.json": "2" * 64,
    }
    run.exports.write_text(run.exports.read_text().replace("  ", " *", 1))
    with pytest.raises(DataError, match="not as it was written"):
        run.exported()
