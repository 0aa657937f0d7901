"""A reward model as a critic: a run of method reward, a folder that save_pretrained wrote, or a
bundle that has one, which needs no torch.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cai_scale.commands import require
from cai_scale.constitution import Constitution
from cai_scale.critics import EMPTY
from cai_scale.critics.reading import check_same, reading_of_bundle, reading_of_model
from cai_scale.errors import ConfigError, MissingError
from cai_scale.records import Score, checksums, exchange, read_json, sha256
from cai_scale.runs import Run
from cai_scale.runtime.bundle import MANIFEST, open_bundle
from cai_scale.runtime.reward import RewardModel, bounded, check_length, score_tokens

if TYPE_CHECKING:
    from cai_scale.training.rewards import Source


class Rewards(Protocol):
    """A reward model, as the runtime has it: see `runtime.reward.RewardModel`."""

    labels: tuple[str, ...]
    objective: str

    def raw(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]: ...


class RewardCritic:
    """Scores by a reward model, which reads the prompt and the response.

    Regression's scores are clipped to [0, 1]; a Bradley-Terry reward, which has no bounds, goes
    through the logistic function. A model with one output gives `overall` alone; one with an
    output a principle gives each, and their weighted mean.
    """

    def __init__(
        self, name: str, constitution: Constitution, open_model: Callable[[], Rewards]
    ) -> None:
        """
        Args:
            open_model: loads the reward model; called when it first scores.
        """
        self.name = name
        self.constitution = constitution
        self._open = open_model

    @cached_property
    def model(self) -> Rewards:
        return self._open()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        """Raises `DataError` for a conversation that is longer than the model reads."""
        given = [index for index, text in enumerate(responses) if text.strip()]
        raw = self.model.raw([prompts[i] for i in given], [responses[i] for i in given])
        scores: list[Score | None] = [None] * len(responses)
        for index, row in zip(given, bounded(raw, self.model.objective).tolist(), strict=True):
            scores[index] = self._score(dict(zip(self.model.labels, row, strict=True)))
        return scores

    def why(self, prompt: str, response: str) -> str:
        return EMPTY

    def _score(self, values: dict[str, float]) -> Score:
        if "overall" in values:
            return Score({}, values["overall"])
        principles = {p.id: values[p.id] for p in self.constitution.principles}
        return Score(principles, self.constitution.overall(principles))


class TorchRewardModel:
    """A reward model in torch, its adapter not merged: the forward pass it was trained with.

    It lies whole on every rank, in fp32 on a CPU and in bf16 on a GPU.
    """

    def __init__(self, source: "Source") -> None:
        import torch

        from cai_scale.training import models, rewards

        self.labels, self.objective = source.labels, source.objective
        dtype = torch.float32 if models.device().type == "cpu" else torch.bfloat16
        with models.whole():
            self._model: Any = rewards.load(source, dtype)
        self._tokenizer: Any = models.load_tokenizer(source.model)
        length = getattr(self._model.config, "max_position_embeddings", None)
        self._longest = length or float("inf")

    def raw(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]:
        """What the head says: [responses, labels], float32, without bounds.

        Raises:
            DataError: a conversation is longer than the model reads.
        """
        rows = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        return score_tokens(self, rows, len(self.labels))

    def encode(self, prompt: str, response: str) -> list[int]:
        """The tokens of a prompt with its response; raises as `raw`."""
        messages = list(exchange(prompt, response))
        encoded = self._tokenizer.apply_chat_template(messages, return_dict=True)
        tokens = list(encoded["input_ids"])
        check_length(response, tokens, self._longest)
        return tokens

    def run(self, input_ids: NDArray[Any], attention_mask: NDArray[Any]) -> NDArray[np.float32]:
        """Logits, [rows, labels]; the arguments are as `ScorerGraph.run` has them."""
        import torch

        device = self._model.device
        tokens, mask = (torch.from_numpy(a).to(device) for a in (input_ids, attention_mask))
        with torch.inference_mode():
            logits = self._model(input_ids=tokens, attention_mask=mask).logits
        scores: NDArray[np.float32] = logits.float().cpu().numpy()
        return scores


def load(name: str, path: str, constitution: Constitution, policy: str | None) -> RewardCritic:
    """The reward model in `path`, checked; its weights are loaded when it first scores.

    Raises:
        CaiError: there is none, it was trained towards another constitution, or it reads text
            otherwise than the policy.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MissingError(
            f"critic {name}: no such folder; name a finished run of method reward, a reward "
            f"model's folder, or a bundle that has one"
        )
    if (folder / MANIFEST).is_file():
        bundle = open_bundle(folder)
        bundle.reward_graph()
        if bundle.manifest["constitution"] != constitution.sha256:
            raise ConfigError(
                f"bundle {folder} was made for another constitution ({bundle.constitution.name}) "
                f"than this one ({constitution.name}); name a reward model of the same"
            )
        if policy is not None:
            check_same(path, reading_of_bundle(bundle), policy, reading_of_model(policy))
        return RewardCritic(name, constitution, lambda: RewardModel(bundle))
    require(f"critic {name}", "train", "torch", "transformers", "peft", "safetensors")
    from cai_scale.training import rewards

    source = rewards.find(folder, constitution)
    if policy is not None and policy != source.model:
        check_same(path, reading_of_model(source.model), policy, reading_of_model(policy))
    return RewardCritic(name, constitution, lambda: TorchRewardModel(source))


def identity(path: str) -> str:
    """The SHA-256 of all that a reward model is made of.

    Raises:
        CaiError: the folder holds none.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return sha256(folder / MANIFEST)
    files = folder
    digests = {}
    if "settings" in read_json(folder / "config.json"):
        run = Run(folder)
        if run.product is None:
            raise MissingError(f"{folder} has no trained reward model; finish the run")
        files, digests = run.product, {f"base/{k}": v for k, v in run.record["weights"].items()}
    found = [*files.glob("*.safetensors"), *files.glob("*.json")]
    digests |= {file.name: sha256(file) for file in found}
    return hashlib.sha256(checksums(digests).encode()).hexdigest()
