"""Critics by name: reward models, weighted sums, the guard, and mistakes in one line."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale import constitution
from cai_scale.config import Config
from cai_scale.critics import check, identity, load_critic
from cai_scale.critics.guard import Checked
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.critics.weighted import WeightedCritic, parse
from cai_scale.errors import CaiError, ConfigError, DataError, IntegrityError, MissingError
from cai_scale.methods import load_method
from cai_scale.ranks import Ranks
from cai_scale.records import Answer, Prompt, Response, Score, read_json, write_json
from cai_scale.runs import Trained
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.reward import RewardModel
from cai_scale.training.precision import Precision
from cai_scale.training.task import Task
from processes import run_python
from test_torch_free import BLOCK
from tiny import save_tiny_llama, save_tiny_scorer

TEXTS = ["Rain.", "", "word " * 60, "  \n", "Trời mưa.", "<|im_end|>"]
ASKED = ["Why?", "a", "How?", "b", "Xin chào", "c"]


class Fixed:
    """A critic that says what it is told to."""

    name = "fixed"

    def __init__(self, *scores: Score | None) -> None:
        self.scores = list(scores)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        return self.scores


@pytest.fixture(scope="module")
def rules(tiny_constitution: Path) -> Any:
    return constitution.load(tiny_constitution)


def finish(run: Any, folder: Path, rules: Any, **settings: Any) -> Path:
    """Train a reward model and leave it as a finished run, with the records of `run`."""
    folder.mkdir(parents=True)
    record = read_json(run.config)
    own = {"method": "reward", "epochs": 6.0, "batch_size": 4, "learning_rate": 3e-3, "lora_r": 4}
    config = Config(model=run.settings()["model"], **own | settings)
    write_json(folder / "config.json", record | {"settings": config.to_dict()})
    for file in (run.constitution, run.summary):
        shutil.copy(file, folder)
    texts = [f"Answer {i}." + " Really, so it is." * (i % 5) for i in range(16)]
    scores = LexiconCritic(rules).score(texts, texts)
    answers = [
        Answer(
            prompt=Prompt(id=str(i), messages=({"role": "user", "content": f"Q{i}?"},)),
            response=Response(
                prompt_id=str(i),
                sample=0,
                round=1,
                temperature=0.7,
                text=text,
                tokens=5,
                finished=True,
            ),
            score=score,
        )
        for i, (text, score) in enumerate(zip(texts, scores, strict=True))
        if score is not None
    ]
    task = Task(
        config=config,
        ranks=Ranks(),
        precision=Precision("fp32", "test"),
        ds_config=None,
        into=Trained(folder),
        answers=answers,
    )
    load_method("reward").train(task)
    return folder


@pytest.fixture(scope="module")
def reward_run(finished_run: Any, rules: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "reward"
    return finish(finished_run, path, rules, reward_outputs="principles")


@pytest.fixture(scope="module")
def scoring(finished_run: Any, reward_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `finished_run` with the trained reward model."""
    path = tmp_path_factory.mktemp("bundles") / "scoring"
    flags = ("--run", str(finished_run.path), "--reward", str(reward_run), "--output", str(path))
    result = run_python("-m", "cai_export.cli", "--merge-lora", *flags, "--min-top1", "0.9")
    assert result.returncode == 0, result.stderr
    return path


def test_a_trained_run_scores_and_its_bundle_scores_alike(
    reward_run: Path, scoring: Path, rules: Any
) -> None:
    critic: Any = load_critic(f"reward:{reward_run}", rules)
    found = critic.score(ASKED, TEXTS)
    assert [score is None for score in found] == [False, True, False, True, False, False]
    raw = critic.critic.model.raw(ASKED, TEXTS)
    graph = RewardModel(open_bundle(scoring), "fp32")
    assert np.abs(graph.raw(ASKED, TEXTS) - raw).max() < 1e-3
    for score, row in zip(found, np.clip(raw, 0, 1).tolist(), strict=True):
        if score is not None:
            assert list(score.principles.values()) == pytest.approx(row)
            assert list(score.principles) == [p.id for p in rules.principles]
            assert score.overall == pytest.approx(rules.overall(score.principles))
    # The control: the rows are not all alike, and not those of another model.
    assert np.abs(raw[0] - raw[2]).max() > 0.01
    tokenised = [critic.critic.model.encode(*text) for text in zip(ASKED, TEXTS, strict=True)]
    assert [graph.encode(*text) for text in zip(ASKED, TEXTS, strict=True)] == tokenised


def test_a_reward_model_is_not_exported_as_a_policy(reward_run: Path) -> None:
    result = run_python("-m", "cai_export.cli", "--merge-lora", "--run", str(reward_run))
    assert result.returncode == 2
    assert "trained a reward model, which scores and does not answer" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (reward_run / "bundle").exists()


def test_the_trainer_reads_what_the_runtime_reads(scoring: Path, finished_run: Any) -> None:
    from cai_scale.methods.reward import encode
    from cai_scale.training.models import load_tokenizer

    tokenizer = load_tokenizer(finished_run.settings()["model"])
    texts = list(zip(ASKED, TEXTS, strict=True))
    graph = RewardModel(open_bundle(scoring))
    assert encode(tokenizer, texts, 512) == [graph.encode(*text) for text in texts]


def test_the_batch_changes_no_score(reward_run: Path, rules: Any) -> None:
    critic = load_critic(f"reward:{reward_run}", rules)
    together = critic.score(ASKED, TEXTS)
    for index, score in enumerate(together):
        [alone] = critic.score([ASKED[index]], [TEXTS[index]])
        assert (alone is None) == (score is None)
        if alone is not None and score is not None:
            assert alone.overall == pytest.approx(score.overall, abs=1e-5)


def test_a_bundle_is_a_critic_without_torch(
    scoring: Path, reward_run: Path, tiny_constitution: Path
) -> None:
    result = run_python(
        "-c",
        BLOCK
        + """
from cai_scale import constitution
from cai_scale.critics import load_critic
critic = load_critic(f"lexicon*0.25+reward:{sys.argv[1]}*0.75", constitution.load(sys.argv[2]))
print(round(critic.score(["Why?"], ["a c n"])[0].overall, 6))
try:
    load_critic(f"reward:{sys.argv[3]}", constitution.load(sys.argv[2]))
except Exception as error:
    print(type(error).__name__)
""",
        *map(str, (scoring, tiny_constitution, reward_run)),
    )
    assert result.stderr == ""
    rules = constitution.load(tiny_constitution)
    [lexicon] = LexiconCritic(rules).score(["Why?"], ["a c n"])
    [reward] = load_critic(f"reward:{scoring}", rules).score(["Why?"], ["a c n"])
    assert lexicon is not None
    assert reward is not None
    expected = 0.25 * lexicon.overall + 0.75 * reward.overall
    assert float(result.stdout.split()[0]) == pytest.approx(expected, abs=1e-5)


def test_a_bradley_terry_model_goes_through_the_logistic_function(
    tmp_path: Path, rules: Any
) -> None:
    folder = save_tiny_scorer(tmp_path / "model", ("overall",))
    texts = (["a", "b"], ["Rain.", "word " * 9])
    clipped = load_critic(f"reward:{folder}", rules)
    raw = clipped.critic.model.raw(*texts)[:, 0]  # type: ignore[attr-defined]
    assert [s.overall for s in clipped.score(*texts) if s] == pytest.approx(np.clip(raw, 0, 1))
    write_json(
        folder / "config.json", read_json(folder / "config.json") | {"objective": "bradley-terry"}
    )
    found = load_critic(f"reward:{folder}", rules).score(*texts)
    assert [s.overall for s in found if s] == pytest.approx(1 / (1 + np.exp(-raw)), abs=1e-6)
    assert all(s is not None and s.principles == {} for s in found)


def test_names_and_weights() -> None:
    assert parse("lexicon") == [("lexicon", 1.0)]
    assert parse("lexicon*3+reward:a/b*1") == [("lexicon", 0.75), ("reward:a/b", 0.25)]
    assert parse("lexicon+reward:a") == [("lexicon", 0.5), ("reward:a", 0.5)]
    assert parse("reward:a+b*c/d*0.5") == [("reward:a+b*c/d", 1.0)]
    for name, said in (
        ("lexicon*0", "above 0"),
        ("lexicon*-1", "above 0"),
        ("lexicon*nan", "above 0"),
        ("lexicon*inf", "above 0"),
        ("lexicon+lexicon", "twice"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse(name)


def test_a_weighted_sum_by_hand() -> None:
    first = Fixed(Score({"a": 0.2, "b": 0.6}, 0.4), None)
    second = Fixed(Score({"b": 1.0}, 1.0), None)
    third = Fixed(Score({}, 0.0), None)
    both = WeightedCritic("sum", [(first, 0.5), (second, 0.3), (third, 0.2)])
    score, none = both.score(["x", "x"], ["y", ""])
    assert none is None
    assert score is not None
    assert score.overall == pytest.approx(0.5 * 0.4 + 0.3)
    assert dict(score.principles) == pytest.approx({"a": 0.2, "b": (0.3 + 0.3) / 0.8})


GOOD = Score({"a": 0.0, "b": 1.0}, 0.5)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((GOOD, Score({}, float("nan"))), "gave nan for 'overall' of row 2"),
        ((Score({}, float("inf")), GOOD), "gave inf for 'overall' of row 1"),
        ((GOOD, Score({}, -0.01)), "gave -0.01 for 'overall' of row 2"),
        ((GOOD, Score({"a": 1.5}, 0.5)), "gave 1.5 for 'a' of row 2"),
        ((GOOD, Score({"a": float("nan")}, 0.5)), "gave nan for 'a' of row 2"),
        ((GOOD,), "gave 1 scores for 2 responses"),
    ],
)
def test_the_guard_stops_what_is_no_score(scores: Any, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        Checked(Fixed(*scores)).score(["x", "x"], ["y", "z"])
    assert error.value.exit_code == 2
    assert "critic fixed" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_guard_lets_scores_pass() -> None:
    """The control."""
    assert Checked(Fixed(GOOD, None)).score(["x", "x"], ["y", ""]) == [GOOD, None]


def refused(name: str, rules: Any, kind: type[CaiError], said: str, model: Any = None) -> None:
    with pytest.raises(kind, match=said) as error:
        check(name, rules, None if model is None else str(model))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_mistakes_are_one_line_and_load_no_weights(
    tmp_path: Path,
    rules: Any,
    reward_run: Path,
    scoring: Path,
    bundle: Path,
    finished_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cai_scale.training import models

    def no_weights(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "_load_weights", no_weights)
    monkeypatch.setattr(RewardModel, "__init__", no_weights)
    for good in ("lexicon", f"reward:{reward_run}", f"lexicon+reward:{scoring}*2"):
        check(good, rules)
    refused("oracle", rules, ConfigError, "unknown critic 'oracle'; choose one of: lexicon")
    refused("reward:", rules, ConfigError, "unknown critic")
    refused("lexicon*x", rules, ConfigError, "unknown critic")
    refused("lexicon+reward:none", rules, MissingError, "no such folder")
    refused(f"reward:{tmp_path}", rules, MissingError, r"no config\.json")
    refused(f"reward:{finished_run.path}", rules, ConfigError, "an adapter for 'CAUSAL_LM'")
    refused(f"reward:{bundle}", rules, MissingError, "has no reward model")
    other = constitution.load()
    refused(f"reward:{reward_run}", other, ConfigError, "another constitution")
    refused(f"reward:{scoring}", other, ConfigError, "another constitution")
    copy = Path(shutil.copytree(reward_run, tmp_path / "reward"))
    (copy / "summary.json").unlink()
    refused(f"reward:{copy}", rules, MissingError, "no finished run")
    (copy / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    shutil.copy(finished_run.summary, copy)
    refused(f"reward:{copy}", rules, IntegrityError, "corrupt")
    with pytest.raises(AssertionError, match="weights were loaded"):  # the control
        load_critic(f"reward:{reward_run}", rules).score(["x"], ["y"])


def test_another_tokenizer_is_refused(
    tmp_path: Path, rules: Any, reward_run: Path, scoring: Path, finished_run: Any
) -> None:
    from cai_scale.training.models import load_tokenizer

    same = save_tiny_llama(tmp_path / "same", seed=5)
    templated = Path(shutil.copytree(same, tmp_path / "templated"))
    tokenizer = load_tokenizer(str(same))
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(templated)
    merged = Path(shutil.copytree(same, tmp_path / "merged"))
    state = read_json(merged / "tokenizer.json")
    state["model"]["merges"] = state["model"]["merges"][::-1]
    write_json(merged / "tokenizer.json", state)
    scorer = save_tiny_scorer(tmp_path / "scorer", ("overall",))
    for name in (f"reward:{reward_run}", f"reward:{scoring}", f"lexicon+reward:{scorer}"):
        check(name, rules, str(same))
        refused(name, rules, ConfigError, "another chat template", templated)
        refused(name, rules, ConfigError, "another list of merges", merged)
    refused(f"reward:{scoring}", rules, ConfigError, f"{scoring}.*{merged}", merged)


def test_the_identity_follows_the_weights(tmp_path: Path, reward_run: Path, scoring: Path) -> None:
    assert identity("lexicon") == {}
    copy = Path(shutil.copytree(reward_run, tmp_path / "reward"))
    found = identity(f"lexicon+reward:{reward_run}*2+reward:{copy}+reward:{scoring}")
    first, second, third = found.values()
    assert list(found) == [f"reward:{path}" for path in (reward_run, copy, scoring)]
    assert first == second != third
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert identity(f"reward:{copy}")[f"reward:{copy}"] != first
    with pytest.raises(CaiError):
        identity(f"reward:{tmp_path}")


def test_a_model_that_was_trained_whole_is_exported(
    tmp_path: Path, finished_run: Any, rules: Any
) -> None:
    """A run without LoRA: its model is found, exported, and its scores are torch's."""
    from cai_export import reward, scorer, weights

    from cai_scale.runtime.graph import pad
    from cai_scale.runtime.reward import ScorerGraph
    from cai_scale.training import rewards

    run = finish(finished_run, tmp_path / "run", rules, lora=False, learning_rate=3e-4)
    source = rewards.find(run, rules)
    assert (source.adapter, source.labels) == (None, ("overall",))
    critic: Any = load_critic(f"reward:{run}", rules)
    raw = critic.critic.model.raw(ASKED, TEXTS)
    rows = [critic.critic.model.encode(*text) for text in zip(ASKED, TEXTS, strict=True)]
    merged = reward.load(source, rows)
    assert merged.max_delta == 0
    weights.save({tmp_path / "model.onnx": scorer.trace_scorer(merged.model)})
    graph = ScorerGraph(tmp_path / "model.onnx")
    assert np.abs(graph.run(*pad(rows, left=True)) - raw).max() < 1e-3
