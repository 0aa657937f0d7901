"""The guard on tiny models, in this process: what it sees, what it keeps, and when it stops."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cai_scale.errors import IntegrityError
from cai_scale.methods import load_method
from cai_scale.records import Score, read_json, read_jsonl
from cai_scale.runs import Run
from cai_scale.training import fit, live
from cai_scale.training.adapters import check_adapter
from cai_scale.training.callbacks import MetricsLog
from cai_scale.training.guard import Guard, Look, best, drawn, reason_to_stop
from tasks import answers, distance, pairs, prompts, task, weights

STEPS = 8  # of the trainings here: two in an epoch, at whose end there is a checkpoint
DATA: dict[str, Any] = {
    **{"prompts": prompts(4), "answers": answers(4), "pairs": pairs(4)},
    **{"epochs": 4.0, "batch_size": 2, "samples": 2, "max_new_tokens": 12},
    **{"guard_steps": 1, "guard_prompts": 3, "guard_budget": 100.0},
}


class Planned:
    """Gives the answers of each look the score that is planned for it; what is asked between two
    looks it judges by a letter."""

    name = "planned"

    def __init__(self, plan: Sequence[float], calls: int = 1) -> None:
        """
        Args:
            calls: of which each look is the first: more than one where a method asks at every step.
        """
        self.plan, self.every, self.calls = list(plan), calls, 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        look, between = divmod(self.calls, self.every)
        self.calls += 1
        if between:
            return [Score({}, min(1.0, r.count("e") / 4)) for r in responses]
        return [Score({}, self.plan[look])] * len(responses)


class Scheduled:
    """Gives the answers of each look the score that is planned for it, counting looks in what the
    run has logged: a start that continues counts on."""

    name = "scheduled"

    def __init__(self, plan: Sequence[float], metrics: Path) -> None:
        self.plan, self.metrics = list(plan), metrics

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        before = [row for _, row in read_jsonl(self.metrics)] if self.metrics.exists() else []
        look = sum("guard/score" in row for row in before)
        return [Score({}, self.plan[look])] * len(responses)


def train(model: Path, folder: Path, critic: Any, **changes: Any) -> Run:
    made = task(model, folder, critic=critic, **{"method": "sft", **DATA, **changes})
    load_method(made.config.method).train(made)
    return Run(folder)


def rows(run: Run, key: str) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(run.metrics) if key in row]


def tensors(folder: Path) -> dict[str, Any]:
    """The weights of a policy that was saved, without a reward head."""
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return {name: value for name, value in load_file(file).items() if "score." not in name}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(bool((one[k] == other[k]).all()) for k in one)


@pytest.fixture
def every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, and none removed."""
    arguments = fit.arguments
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}

    def all_kept(task: Any, kind: Any, *, rows: int, **own: Any) -> Any:
        return arguments(task, kind, rows=rows, **{**own, **saving})

    monkeypatch.setattr(fit, "arguments", all_kept)


def looks(*seen: tuple[float, float]) -> list[Look]:
    """Of (score, drift), two steps apart."""
    return [Look(step=2 * i, score=s, kl=kl, words=1.0) for i, (s, kl) in enumerate(seen)]


@pytest.mark.parametrize(
    ("seen", "step"),
    [
        ([(0.5, 0.0)], 0),
        ([(0.5, 0.0), (0.6, 0.09), (0.7, 0.11)], 2),
        ([(0.5, 0.0), (0.6, 0.1), (0.6, 0.05)], 2),  # the earliest among equals; the end belongs
        ([(0.5, 0.0), (0.4, 0.01), (0.45, 0.02)], 0),
        ([(0.5, 9.9), (0.4, 0.01)], 0),  # where it starts counts, whatever its drift
        ([(0.5, 0.0), (0.9, inf)], 0),
    ],
)
def test_the_best_look_is_within_the_budget(seen: list[tuple[float, float]], step: int) -> None:
    assert best(looks(*seen), 0.1).step == step


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        ([(0.5, 0.0)], None),
        ([(0.5, 9.9)], None),  # where it starts ends nothing
        ([(0.5, 0.0), (0.6, 0.2)], None),
        ([(0.5, 0.0), (0.6, 0.21)], "a drift of 0.210 nats a token, over 2 times the budget"),
        ([(0.5, 0.0), (0.6, inf)], "a drift of inf nats a token, over 2 times the budget"),
        ([(0.5, 0.0), (0.6, 0.0), (0.6, 0.0), (0.5, 0.0)], None),
        ([(0.5, 0.0), *[(0.4, 0.0)] * 3], "no better state at the last 3 looks"),
        ([(0.5, 0.0), *[(0.9, 0.15)] * 3], "no better state at the last 3 looks"),
    ],
)
def test_when_a_training_goes_no_further(
    seen: list[tuple[float, float]], reason: str | None
) -> None:
    assert reason_to_stop(looks(*seen), 0.1) == reason


def test_the_prompts_are_drawn_by_the_seed_in_their_order() -> None:
    every = prompts(50)
    chosen = drawn(every, 24, 0)
    assert len({p.id for p in chosen}) == 24 and chosen == drawn(every, 24, 0)
    assert [int(p.id) for p in chosen] == sorted(int(p.id) for p in chosen)
    assert chosen != drawn(every, 24, 1)
    assert drawn(every[:5], 24, 0) == every[:5]


FALLS = [0.2, 0.4, 0.6, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]  # after step 3


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    ("method", "settings", "calls"),
    [
        ("sft", {}, 1),
        ("dpo", {}, 1),
        ("rlaif", {"answers": answers(4, samples=1)}, 1),
        ("rlaif", {"refresh": "step"}, 2),
        ("grpo", {"temperatures": (1.0,)}, 2),
    ],
)
def test_what_is_kept_is_the_checkpoint_after_which_the_score_fell(
    tmp_path: Path,
    tiny_model: Path,
    every_checkpoint: None,
    method: str,
    settings: dict[str, Any],
    calls: int,
    lora: bool,
) -> None:
    settings = {"method": method, "lora": lora, "lora_dropout": 0.0, **settings}
    run = train(tiny_model, tmp_path / "run", Planned(FALLS, calls), **settings)
    assert run.product is not None
    seen = rows(run, "guard/score")
    assert [row["step"] for row in seen] == [0, 1, 2, 3, 4, 5, 6]  # three without a better one
    assert [row["guard/score"] for row in seen] == pytest.approx(FALLS[:7])
    assert [row["guard/kept"] for row in seen] == [1, 1, 1, 1, 0, 0, 0]
    assert [row["step"] for row in rows(run, "loss")] == [1, 2, 3, 4, 5, 6]
    kept = tensors(run.product)
    assert same(kept, tensors(run.checkpoints / "checkpoint-3"))
    for other in (2, 4, 6):  # the control
        assert not same(kept, tensors(run.checkpoints / f"checkpoint-{other}"))
    note = read_json(run.product / "guard.json")
    assert (note["step"], note["score"]) == (3, pytest.approx(0.9))
    assert {path.name for path in run.path.iterdir() if path.name.startswith(".")} == set()


def test_the_drift_is_the_divergence_of_its_answers_from_the_base(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Σ p (log p - log q) in float64, one answer at a time, for the state that was kept."""
    import torch

    from cai_scale.training.models import load_model, load_trained

    kept: list[list[live.Sampled]] = []
    sample = live.LivePolicy.sample

    def watched(*given: Any, **named: Any) -> list[live.Sampled]:
        kept.append(sample(*given, **named))
        return kept[-1]

    monkeypatch.setattr(live.LivePolicy, "sample", watched)
    run = train(tiny_model, tmp_path / "run", Planned(np.linspace(0.1, 0.9, 9)))
    first, *_, last = rows(run, "guard/kl")
    assert first["guard/kl"] == pytest.approx(0, abs=1e-6)
    base = load_model(str(tiny_model), torch.float64)
    policy = load_trained(str(tiny_model), run.product, torch.float64)

    def divergence(p: Any, q: Any, one: live.Sampled) -> Any:
        ids = torch.tensor([[*one.prompt_ids, *one.ids]])
        places = slice(len(one.prompt_ids) - 1, -1)
        with torch.inference_mode():
            log_p, log_q = (m(input_ids=ids).logits[0, places].log_softmax(-1) for m in (p, q))
        return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()

    def mean(p: Any, q: Any, of: list[live.Sampled]) -> float:
        return float(np.concatenate([divergence(p, q, one) for one in of]).mean())

    assert last["guard/kl"] == pytest.approx(mean(policy, base, kept[-1]), rel=1e-4)
    assert last["guard/kl"] > 0.01
    words = [len(one.completion.text.split()) for one in kept[-1]]
    assert last["guard/words"] == pytest.approx(sum(words) / 3)
    # The controls: the other direction, the answers of another look.
    assert last["guard/kl"] != pytest.approx(mean(base, policy, kept[-1]), rel=1e-2)
    assert last["guard/kl"] != pytest.approx(mean(policy, base, kept[0]), rel=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [True, False])
def test_looking_changes_nothing(tmp_path: Path, kind: str, lora: bool) -> None:
    """The same losses and the same product as without a guard, bit for bit, where no look gives a
    reason to interfere; with dropout, whose random numbers the looks must leave alone."""
    from tiny import save_tiny_gpt2, save_tiny_llama

    save: Callable[[Path], Path] = {"llama": save_tiny_llama, "gpt2": save_tiny_gpt2}[kind]
    model, given = save(tmp_path / "model"), {"lora": lora, "lora_dropout": 0.1}
    rising = Planned(np.linspace(0.1, 0.9, 9))
    guarded = train(model, tmp_path / "guarded", rising, **given)
    plain = train(model, tmp_path / "plain", Planned([]), **given, guard_steps=0)
    assert [r["loss"] for r in rows(guarded, "loss")] == [r["loss"] for r in rows(plain, "loss")]
    assert guarded.product is not None and plain.product is not None
    assert same(tensors(guarded.product), tensors(plain.product))
    # The control: where a look does give a reason, the product is another; off, none is looked at.
    harmed = train(model, tmp_path / "harmed", Planned(FALLS), **given)
    assert harmed.product is not None
    assert not same(tensors(harmed.product), tensors(plain.product))
    assert rows(plain, "guard/score") == [] and not (plain.product / "guard.json").exists()


@pytest.mark.parametrize("lora", [True, False])
def test_a_training_that_drifts_too_far_ends_as_it_began(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], lora: bool
) -> None:
    import torch

    from cai_scale.training.models import load_model, load_trained

    given = {"guard_budget": 1e-6, "guard_steps": 3, "lora": lora}
    run = train(tiny_model, tmp_path / "run", Planned([0.1, 0.9, 0.9]), **given)
    assert [row["step"] for row in rows(run, "loss")] == [1, 2, 3]
    assert [row["guard/kept"] for row in rows(run, "guard/kept")] == [1, 0]
    said = capsys.readouterr().out
    assert "the product is the policy as it was; stopped at step 3: a drift of" in said
    base = load_model(str(tiny_model), torch.float32)
    policy = load_trained(str(tiny_model), run.product, torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(policy(input_ids=ids).logits, base(input_ids=ids).logits)
    # The control: with a budget that is never met it goes on to the end.
    far = train(
        tiny_model,
        tmp_path / "far",
        Planned([0.1, 0.9, 0.9, 0.9]),
        **{**given, "guard_budget": 100.0},
    )
    assert [row["step"] for row in rows(far, "guard/kept")] == [0, 3, 6, 8]
    assert len(rows(far, "loss")) == STEPS
    if lora:  # an adapter of zeros is refused, but where a guard says so
        assert run.product is not None
        check_adapter(run.product)
        (run.product / "guard.json").unlink()
        with pytest.raises(IntegrityError, match="nothing was learned"):
            check_adapter(run.product)


# What is kept after steps 0, 1, 3 and 6; there are checkpoints after 2, 4, 6 and 8.
BETTER_AND_WORSE = [0.2, 0.4, 0.3, 0.6, 0.5, 0.5, 0.7, 0.6, 0.6]


def train_on(model: Path, folder: Path, plan: Sequence[float] = BETTER_AND_WORSE) -> Run:
    return train(model, folder, Scheduled(plan, Run(folder).metrics))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """A training that nobody kills."""
    run = train_on(tiny_model, tmp_path_factory.mktemp("whole") / "run")
    assert [row["guard/kept"] for row in rows(run, "guard/kept")] == [1, 1, 0, 1, 0, 0, 1, 0, 0]
    return run


def figures(run: Run) -> list[dict[str, Any]]:
    """What was seen, and the losses, in their order."""
    names = ("step", "loss", "guard/score", "guard/kl", "guard/words", "guard/kept")
    return [
        {name: row[name] for name in names if name in row}
        for _, row in read_jsonl(run.metrics)
        if "loss" in row or "guard/score" in row
    ]


def killing(step: int, at: str) -> Callable[..., None]:
    """A log that is killed after the row of a step that has the figure `at`."""
    log = MetricsLog.on_log

    def kill(self: Any, args: Any, state: Any, control: Any, logs: Any, **named: Any) -> None:
        log(self, args, state, control, logs, **named)
        if state.global_step == step and at in logs:
            raise KeyboardInterrupt

    return kill


@pytest.mark.parametrize("at", ["loss", "guard/score"])
@pytest.mark.parametrize("killed", range(1, STEPS))
def test_a_killed_training_ends_with_the_same_product(
    tmp_path: Path,
    tiny_model: Path,
    whole: Run,
    monkeypatch: pytest.MonkeyPatch,
    killed: int,
    at: str,
) -> None:
    """After a look and after a step, before the first checkpoint and later: a state that is kept
    and lies behind the checkpoint is forgotten with its row."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLog, "on_log", killing(killed, at))
        train_on(tiny_model, tmp_path / "run")
    run = train_on(tiny_model, tmp_path / "run")
    assert figures(run) == figures(whole)
    assert distance(weights(run.path), weights(whole.path)) == 0
    assert not list(run.path.glob(".*"))


def test_a_start_that_continues_can_go_back_to_what_was_the_best(
    tmp_path: Path, tiny_model: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state after step 3 was better than that after step 1, and is forgotten with its row."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLog, "on_log", killing(3, "guard/score"))
        train_on(tiny_model, tmp_path / "run")
    run = train_on(tiny_model, tmp_path / "run", [*BETTER_AND_WORSE[:3], *[0.1] * 6])
    other = train_on(tiny_model, tmp_path / "other", [0.2, 0.4, *[0.1] * 7])
    assert distance(weights(run.path), weights(other.path)) == 0
    assert distance(weights(run.path), weights(whole.path)) > 0


def test_a_training_that_was_stopped_and_killed_does_not_go_on(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the product of the looks that it had, whatever a further one would see."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            Guard, "take_product", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        train(tiny_model, tmp_path / "run", Planned(FALLS))
    assert Run(tmp_path / "run").product is None
    critic = Planned([1.0] * 9)
    run = train(tiny_model, tmp_path / "run", critic)
    assert critic.calls == 0
    assert run.product is not None
    assert read_json(run.product / "guard.json")["step"] == 3
    other = train(tiny_model, tmp_path / "other", Planned(FALLS))
    assert distance(weights(run.path), weights(other.path)) == 0


def test_a_later_training_starts_from_a_policy_that_was_left_as_it_was(
    tmp_path: Path, tiny_model: Path
) -> None:
    falling = {"guard_steps": 4, "guard_budget": 100.0}
    first = train(tiny_model, tmp_path / "a", Planned([0.9, 0.1, 0.1]), **falling)
    second = train(
        tiny_model, tmp_path / "b", Planned([0.1, 0.2, 0.3]), start=first.product, **falling
    )
    plain = train(tiny_model, tmp_path / "c", Planned([]), guard_steps=0)
    assert distance(weights(second.path), weights(plain.path)) == 0


def test_an_answer_that_is_empty_scores_zero(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = live.LivePolicy.sample

    def one_empty(*given: Any, **named: Any) -> list[live.Sampled]:
        first, *others = sample(*given, **named)
        return [replace(first, score=None), *others]

    monkeypatch.setattr(live.LivePolicy, "sample", one_empty)
    run = train(tiny_model, tmp_path / "run", Planned([0.9] * 9))
    assert rows(run, "guard/score")[0]["guard/score"] == pytest.approx(0.6)


def test_the_answers_do_not_depend_on_the_step(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rate that moves nothing all looks see the same; with another seed, something else."""
    kept: list[list[tuple[int, ...]]] = []
    sample = live.LivePolicy.sample

    def watched(*given: Any, **named: Any) -> list[live.Sampled]:
        found = sample(*given, **named)
        kept.append([one.ids for one in found])
        return found

    monkeypatch.setattr(live.LivePolicy, "sample", watched)
    still = {"learning_rate": 1e-12, "guard_steps": 3}
    train(tiny_model, tmp_path / "a", Planned([0.1, 0.2, 0.3, 0.4]), **still)
    assert len(kept) == 4 and all(ids == kept[0] for ids in kept)
    train(tiny_model, tmp_path / "b", Planned([0.1, 0.2, 0.3, 0.4]), **still, seed=1)
    assert kept[4] != kept[0]


def test_only_the_newest_best_outlives_a_checkpoint(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[set[str]] = []
    prune = Guard.on_save

    def watched(self: Guard, *given: Any, **named: Any) -> None:
        prune(self, *given, **named)
        there.append({path.name for path in self._kept.iterdir()})

    monkeypatch.setattr(Guard, "on_save", watched)
    train(tiny_model, tmp_path / "run", Planned(FALLS))
    assert there == [{"step-2"}, {"step-3"}, {"step-3"}]
