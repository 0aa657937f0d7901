"""What follows from a run's settings and its stored answers. The pipeline writes it; `verify`
works it out again, by the same code. No torch.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cai_scale.config import Config
from cai_scale.constitution import Constitution
from cai_scale.critics import Critic
from cai_scale.critics.complaint import RevisionRules
from cai_scale.evaluation import protocol
from cai_scale.evaluation.compare import Answered, compare, drift, slices
from cai_scale.preferences.audit import audit
from cai_scale.preferences.pairs import build_pairs
from cai_scale.ranks import Ranks
from cai_scale.records import Pair, Prompt, Response
from cai_scale.rollout.collect import collect, requests_for
from cai_scale.rollout.revise import revise
from cai_scale.rollout.sampler import Sampler
from cai_scale.runs import Round, Run


def rollouts(
    config: Config, prompts: Sequence[Prompt], files: Round, sampler: Sampler, ranks: Ranks
) -> list[Response]:
    """The samples of a round; those that are stored already are not asked for again."""
    requests = requests_for(
        prompts, config.temperatures, samples=config.samples, seed=config.seed, round=1
    )
    return collect(
        sampler,
        requests,
        files.rollouts,
        batch_size=config.rollout_batch_size,
        ranks=ranks,
        title="sampling",
    )


def revisions(
    config: Config,
    constitution: Constitution,
    critic: Critic,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    files: Round,
    sampler: Sampler,
    ranks: Ranks,
) -> list[Response]:
    """Each sample, or its best revision; those that are stored already are not asked for again."""
    return revise(
        sampler,
        critic,
        constitution,
        prompts,
        responses,
        files.revisions,
        rules=RevisionRules(tries=config.revisions),
        seed=config.seed,
        batch_size=config.rollout_batch_size,
        ranks=ranks,
    )


def pairs(
    config: Config, critic: Critic, prompts: Sequence[Prompt], responses: Sequence[Response]
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of a round, and their audit."""
    text = {prompt.id: prompt.text for prompt in prompts}
    scores = critic.score([text[r.prompt_id] for r in responses], [r.text for r in responses])
    built, account = build_pairs(prompts, responses, scores, margin=config.margin)
    return built, audit(built, account)


def heldout(
    prompts: Sequence[Prompt], run: Run, when: str, sampler: Sampler, ranks: Ranks
) -> list[Response]:
    """The answers to the held-out prompts "before" or "after", by the frozen protocol."""
    requests = requests_for(
        prompts, (protocol.DECODING.temperature,), samples=1, seed=protocol.SEED, round=0
    )
    return collect(
        sampler,
        requests,
        run.evaluation(when),
        batch_size=protocol.BATCH_SIZE,
        ranks=ranks,
        title=f"answering {when}",
    )


def answered(
    critic: Critic,
    prompts: Sequence[Prompt],
    before: Sequence[Response],
    after: Sequence[Response],
) -> list[Answered]:
    """The held-out prompts with both of their answers and the scores of these."""
    texts = [prompt.text for prompt in prompts]
    rows = zip(
        prompts,
        before,
        after,
        critic.score(texts, [r.text for r in before]),
        critic.score(texts, [r.text for r in after]),
        strict=True,
    )
    return [
        Answered(prompt=p, before=b, after=a, before_score=bs, after_score=as_)
        for p, b, a, bs, as_ in rows
    ]


def summary(
    config: Config,
    constitution: Constitution,
    critic: Critic,
    answers: Sequence[Answered],
    seconds: dict[str, Any],
) -> dict[str, Any]:
    """The content of `summary.json`."""
    return {
        "schema": 1,
        "method": config.method,
        "model": config.model,
        "constitution": constitution.sha256,
        "critic": critic.name,
        **compare(answers, constitution),
        "drift": drift(answers),
        "slices": slices(answers, constitution),
        "decoding": asdict(protocol.DECODING) | {"stop": list(protocol.DECODING.stop)},
        "seeds": [protocol.SEED],
        "seconds": seconds,
    }
