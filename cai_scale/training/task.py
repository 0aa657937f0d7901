"""What a method is given: the settings, the data of one round, and where its training goes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_scale.config import Config
from cai_scale.critics import Critic
from cai_scale.ranks import Ranks
from cai_scale.records import Answer, Pair, Prompt
from cai_scale.rollout.sampler import Sampler
from cai_scale.runs import Trained
from cai_scale.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training of one method, on every rank.

    Attributes:
        into: where the product, the checkpoints and the figures go.
        start: the adapter or model folder from which the training continues; None starts from
            the base model.
        prompts, answers, pairs: the round's data; answers that are empty have no score and are
            left out.
        references: the file that keeps what the base model gives the pairs, for methods that
            compare the policy with it.
        weights: SHA-256 of each file of the base model's weights, by its name.
        critic: scores the answers of methods that sample while they train, and of guards.
        sampler: makes a sampler of the policy in a folder, or of the base model where that is
            None, for methods that sample while they train: see `training.live`. Where there is
            no such factory, they sample with transformers from the weights in this process.
        local: the same for guards, which never ask a server.
        round: counts from 1.
    """

    config: Config
    ranks: Ranks
    precision: Precision
    ds_config: dict[str, Any] | None
    into: Trained
    start: Path | None = None
    round: int = 1
    prompts: Sequence[Prompt] = ()
    answers: Sequence[Answer] = ()
    pairs: Sequence[Pair] = ()
    references: Path | None = None
    weights: Mapping[str, str] = field(default_factory=dict)
    critic: Critic | None = None
    sampler: Callable[[Path | None], Sampler] | None = None
    local: Callable[[Path | None], Sampler] | None = None
