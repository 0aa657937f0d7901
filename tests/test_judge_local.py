"""A judge in this process: a tiny random model, which knows no JSON and no letters."""

from pathlib import Path

import pytest

from cai_scale import constitution as constitutions
from cai_scale.critics import INVALID
from cai_scale.critics import judge as judges
from cai_scale.critics.judge import Settings, local, verdict

RULES = constitutions.load()


def make(model: Path, **settings: object) -> judges.Judge:
    given = {"model": str(model), "principles": "one", "reply_tokens": 8, "concurrency": 3}
    return judges.load(RULES, Settings(**(given | settings)), shown=False)  # type: ignore[arg-type]


def test_a_probability_is_that_of_the_model(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens that a random model finds likely stand for A and B."""
    import torch
    from transformers import AutoModelForCausalLM

    from cai_scale.training.models import load_tokenizer

    judge = make(tiny_model, mode="logprob")
    tokenizer = load_tokenizer(str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    asked = next(iter(judge._orders("p", "an answer", "another")))
    ids = [
        tokenizer.apply_chat_template(
            list(question.messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for _, question in asked
    ]
    with torch.inference_mode():
        logs = [model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1) for row in ids]
    likely = [tokenizer.decode([token]).strip().upper() for token in logs[0].topk(20).indices]
    letters = list(dict.fromkeys(text for text in likely if text.isalnum()))[:2]
    monkeypatch.setattr(verdict, "OPTIONS", letters)
    monkeypatch.setattr(verdict, "LEAST_MASS", 1e-9)
    judge.compare(["p"], ["an answer"], ["another"])
    for (subject, _), row in zip(asked, logs, strict=True):
        mass = dict.fromkeys(letters, 0.0)
        for log, token in zip(*row.topk(20), strict=True):
            text = tokenizer.decode([int(token)]).strip().upper()
            if text in mass:
                mass[text] += float(log.exp())
        found = judge.journal.get(subject)
        assert found is not None and found.values is not None
        expected = mass[letters[0]] / sum(mass.values())
        assert list(found.values.values()) == [pytest.approx(expected, abs=1e-5)]
        assert 0 < expected < 1
    assert judge.journal.spent(judge.model.name).tokens_in == sum(map(len, ids))


@pytest.mark.parametrize("thinking", [False, True])
def test_what_is_no_verdict_is_an_abstention(tiny_model: Path, thinking: bool) -> None:
    judge = make(tiny_model, thinking=thinking)
    texts = [f"answer {number}" for number in range(5)]
    assert judge.score(["p"] * 5, texts) == [None] * 5
    assert all(judge.why("p", text).startswith(INVALID) for text in texts)
    assert judge.spent["calls"] == 5 * local.REPLIES
    assert judge.spent["completion_tokens"] <= 5 * local.REPLIES * 8


def test_letters_after_reasoning(tiny_model: Path) -> None:
    judge = make(tiny_model, mode="logprob", thinking=True)
    [found] = judge.compare(["p"], ["an answer"], ["another"])
    assert found.lean is None and found.why.startswith(INVALID)
    assert judge.spent["calls"] == 2 * 2 * local.REPLIES  # reasoning and letter, both orders
