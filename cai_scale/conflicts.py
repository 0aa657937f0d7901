"""Settings that cannot be, by themselves or together. No torch."""

from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING

from cai_scale.critics.weighted import parse

if TYPE_CHECKING:
    from cai_scale.config import Config


def conflicts(config: "Config") -> Iterator[str]:
    """What is wrong with each, and the remedy, in one line."""
    for name in ("learning_rate", "epochs"):
        if getattr(config, name) <= 0:
            yield f"--{name} {getattr(config, name)}: expected a number above 0"
    for wrong, complaint in (
        (not config.temperatures, "--temperatures: expected at least one number"),
        (config.seed >= 2**32, f"--seed {config.seed}: expected a number under 2**32"),
        (
            config.samples > 1 and not any(config.temperatures),
            "--temperatures 0: all samples of a prompt would be the same; give one above 0",
        ),
        (
            config.lora_dropout >= 1,
            f"--lora_dropout {config.lora_dropout}: expected a number under 1",
        ),
        (
            not 0 < config.top_p <= 1,
            f"--top_p {config.top_p}: expected a number above 0 and at most 1",
        ),
        (
            not isfinite(config.loss_margin),
            f"--loss_margin {config.loss_margin}: expected a finite number",
        ),
        (
            config.compares and config.samples < 2,
            f"--samples {config.samples}: {config.method} compares the answers to a prompt; ask "
            f"for 2 or more",
        ),
        (
            config.method == "dpo" and config.loss != "margin" and config.beta == 0,
            "--beta 0.0: expected a number above 0 with dpo",
        ),
        (
            config.objective == "bradley-terry" and config.reward_outputs == "principles",
            "--reward_outputs principles with --objective bradley-terry: pairs are ordered by "
            "one score; use regression",
        ),
        (
            config.qlora and not config.lora,
            "--qlora with --no-lora: weights in 4 bits cannot be trained; give one of them",
        ),
        (
            not config.judged and not (config.judge_url is None and config.judge_model is None),
            f"--judge_url or --judge_model with --critic {config.critic}: a judge goes with "
            f"--critic judge, or with --evaluator judge",
        ),
        (
            config.judge_principles == "one" and not config.labels_pairs,
            "--judge_principles one: a judge draws a principle for two answers; use it with "
            "another --judge_mode than absolute",
        ),
        (
            config.first_pass and not (config.labels_pairs and config.pairs == "answers"),
            "--first_pass chooses which answers a judge compares; use it with another "
            "--judge_mode than absolute, and without --pairs revisions",
        ),
        (
            not 0 <= config.min_agreement <= 1,
            f"--min_agreement {config.min_agreement}: expected a number from 0 to 1",
        ),
        (
            config.min_agreement > 0 and len(parse(config.critic)) < 2,
            f"--min_agreement with --critic {config.critic}: one critic agrees with itself; name "
            f"several",
        ),
        (
            config.pairs == "revisions" and not config.pairwise,
            f"--pairs revisions with --method {config.method}, which does not train on pairs",
        ),
        (
            config.revision == "critique" and not (config.collects and config.revisions),
            "--revision critique: nothing is revised here; ask for --revisions 1, of a method "
            "that samples before it trains",
        ),
        (
            config.labels_pairs and not (config.pairwise and config.critic == "judge"),
            f"--judge_mode {config.judge_mode} labels pairs: use it with --critic judge alone, "
            f"and with --method dpo, or reward with --objective bradley-terry",
        ),
        (
            config.pairs == "revisions" and config.revisions == 0,
            "--pairs revisions with --revisions 0: there would be none; ask for one",
        ),
        (
            len(config.judge_prices) not in (0, 2),
            f"--judge_prices {config.judge_prices}: expected two numbers",
        ),
        (
            config.judge_max_cost is not None and not config.judge_prices,
            "--judge_max_cost needs --judge_prices, of the tokens read and written",
        ),
        (
            (config.sampler == "openai") != (config.sampler_url is not None),
            f"--sampler {config.sampler} {'with' if config.sampler_url else 'without'} "
            f"--sampler_url: a server's address goes with --sampler openai, and with no other",
        ),
        (
            config.method == "reward" and config.evaluator != "lexicon",
            f"--evaluator {config.evaluator} with --method reward: a reward model is measured "
            f"against its --critic; leave --evaluator out",
        ),
        (
            config.guard_steps > 0 and (config.method == "reward" or config.labels_pairs),
            "--guard_steps: a guard scores the answers of a policy in training; leave it out with "
            "--method reward, and with another --judge_mode than absolute",
        ),
    ):
        if wrong:
            yield complaint
