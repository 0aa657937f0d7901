"""GRPO with a critic as the reward, by TRL's GRPOTrainer.

Shao et al. 2024 (arXiv 2402.03300), section 4: at every step the policy answers `--batch_size`
prompts `--samples` times each. The critic's overall score r of an answer, 0 for an empty one,
becomes the advantage of all its tokens, A = (r - mean) / (std + 1e-4), over the answers to the
same prompt. The loss is the mean over all of the step's tokens of -ρ A + β D, where D is the
estimate π_ref/π - log(π_ref/π) - 1 of the KL divergence from the base model and ρ = π/π_old. The
answers are drawn anew for each step, so ρ is 1 and only its gradient counts. The paper takes the
mean over each answer first, which favours short good ones; the mean over tokens is TRL's default
(Yu et al. 2025, arXiv 2503.14476).

The reference is the base model: under LoRA the trained model with its adapter switched off, else
a second copy; none with β 0. `--micro_batch_size` counts answers here, not prompts.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from cai_scale.errors import ConfigError
from cai_scale.records import Prompt
from cai_scale.training import adapters, fit, models
from cai_scale.training.batches import plan_batch
from cai_scale.training.live import LivePolicy, Sampled, in_order, one_pass, order
from cai_scale.training.positions import count_from_the_mask
from cai_scale.training.task import Task


def train(task: Task) -> None:
    """Train on answers to `task.prompts`, scored by `task.critic`. Called on every rank.

    Raises:
        ConfigError: a prompt and the longest answer exceed `--max_length`.
        IntegrityError: the saved adapter is not the trained one.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = task.config
    tokenizer = models.load_tokenizer(config.model)
    tokenizer.padding_side = "left"
    asked = order(task)
    batch = plan_batch(
        config.batch_size * config.samples, config.micro_batch_size, task.ranks.world
    )
    arguments = fit.arguments(
        task,
        GRPOConfig,
        rows=one_pass(task),
        **in_order(task),
        per_device_train_batch_size=batch.per_rank,
        gradient_accumulation_steps=batch.accumulation,
        shuffle_dataset=False,
        beta=config.beta,
        num_generations=config.samples,
        max_completion_length=config.max_new_tokens,
        temperature=temperature(task),
        top_p=config.top_p,
        top_k=config.top_k,
        # Answers are drawn without dropout, and would not be the policy's with it.
        disable_dropout=True,
    )
    with closing(LivePolicy(task, tokenizer)) as live:
        _check_room(task, live)
        trainer = GRPOTrainer(
            model=_policy(task),
            reward_funcs=critic,
            args=arguments,
            # TRL sees the prompts' ids alone; `rollout` knows what they stand for.
            train_dataset=Dataset.from_dict({"prompt": [prompt.id for prompt in asked]}),
            processing_class=tokenizer,
            peft_config=adapters.lora(config) if config.lora else None,
            rollout_func=lambda ids, trainer: rollout(task, live, asked, ids, trainer),
        )
        if trainer.ref_model is not None:
            count_from_the_mask(trainer.accelerator.unwrap_model(trainer.ref_model))
        fit.fit(task, trainer, reward="reward", kl="kl")


def temperature(task: Task) -> float:
    """The highest of `--temperatures`: all answers of a group come from one distribution, the
    one whose log-probabilities TRL learns from, logits divided by the temperature."""
    return max(task.config.temperatures)


def rollout(
    task: Task, live: LivePolicy, asked: Sequence[Prompt], ids: Sequence[str], trainer: Any
) -> dict[str, Any]:
    """This rank's rows of a step: the prompts' and the answers' tokens, and the answers.

    Args:
        asked: the prompts of every step.
        ids: the prompts of this rank's rows. The rows of all ranks, one rank after another, are
            the step's prompts, each as often as it is answered.
    """
    config = task.config
    start = trainer.state.global_step * config.batch_size
    prompts = asked[start : start + config.batch_size]
    sampled = live.sample(trainer, prompts, config.samples, [temperature(task)])
    first = task.ranks.rank * len(ids)
    mine = sampled[first : first + len(ids)]
    assert [one.prompt.id for one in mine] == list(ids)
    return {
        "prompt_ids": [list(one.prompt_ids) for one in mine],
        "completion_ids": [list(one.ids) for one in mine],
        "logprobs": None,
        "sampled": mine,
        "rows": len(sampled),
    }


def critic(
    sampled: Sequence[Sampled], rows: Sequence[int], log_metric: Any, **_: Any
) -> list[float]:
    """The reward of each answer, which was scored where it was sampled; figures for the log."""
    for one, total in zip(sampled, rows, strict=True):
        # Figures are means over all answers of a step: of this one, the mean is the sum.
        log_metric("sampled_tokens", one.completion.tokens * total)
        for name, score in (one.score.principles if one.score else {}).items():
            log_metric(f"principles/{name}", score)
    return [one.score.overall if one.score else 0.0 for one in sampled]


def _policy(task: Task) -> Any:
    model = fit.policy(task)
    # Where the whole model is trained, TRL loads the reference from here: it stays the base
    # model when the training continues from another.
    model.config._name_or_path = models.resolve(task.config.model)
    count_from_the_mask(model)
    return model


def _check_room(task: Task, live: LivePolicy) -> None:
    config = task.config
    room = config.max_length - config.max_new_tokens
    longer = sum(len(live.prompt_ids(prompt)) > room for prompt in task.prompts)
    if longer:
        raise ConfigError(
            f"{longer} prompts leave no room for an answer of {config.max_new_tokens} tokens in "
            f"--max_length {config.max_length}; raise it, or shorten the prompts"
        )
