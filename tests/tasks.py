"""Trainings of one method on made-up data, in this process, without DeepSpeed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cai_scale import constitution
from cai_scale.config import Config
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.methods import load_method
from cai_scale.ranks import Ranks
from cai_scale.records import Answer, Candidate, Pair, Prompt, Response, Score, read_jsonl
from cai_scale.runs import Run
from cai_scale.training.models import weights_sha256
from cai_scale.training.precision import Precision
from cai_scale.training.task import Task


def prompts(count: int = 6) -> list[Prompt]:
    return [
        Prompt(id=str(i), messages=({"role": "user", "content": f"Question {i}?"},))
        for i in range(count)
    ]


def pairs(count: int = 6) -> list[Pair]:
    def candidate(text: str, score: float) -> Candidate:
        return Candidate(text=text, score=score, temperature=0.7, revised=False)

    return [
        Pair(
            prompt_id=prompt.id,
            language="en",
            messages=prompt.messages,
            chosen=candidate(f"Yes, {i} is a good number." + " Really." * i, 0.9),
            rejected=candidate(f"No idea about {i}.", 0.7),
        )
        for i, prompt in enumerate(prompts(count))
    ]


def answers(count: int = 6, samples: int = 2) -> list[Answer]:
    """Answers of different lengths; the later sample of a prompt has the higher score."""

    def answer(prompt: Prompt, i: int, sample: int) -> Answer:
        response = Response(
            prompt_id=prompt.id,
            sample=sample,
            round=1,
            temperature=0.7,
            text=f"Answer {sample} is {i}." + " Indeed." * (i * (sample + 1)),
            tokens=9,
            finished=True,
        )
        overall = 0.4 + 0.05 * i + 0.1 * sample
        ids = [principle.id for principle in constitution.load().principles]
        score = Score({name: overall + 0.02 * k - 0.03 for k, name in enumerate(ids)}, overall)
        return Answer(prompt=prompt, response=response, score=score)

    return [answer(p, i, s) for i, p in enumerate(prompts(count)) for s in range(samples)]


def task(model: Path, folder: Path, **given: Any) -> Task:
    """A task in a new folder; what is not of a `Task` is a setting."""
    own = {name: given.pop(name) for name in tuple(given) if name in Task.__dataclass_fields__}
    settings = {"epochs": 1.0, "batch_size": 2, "learning_rate": 3e-3, "lora_r": 4} | given
    folder.mkdir(exist_ok=True)
    return Task(
        **{
            "config": Config(model=str(model), **settings),
            "ranks": Ranks(),
            "precision": Precision("fp32", "test"),
            "ds_config": None,
            "into": Run(folder),
            "references": Run(folder).round(1).references,
            "weights": weights_sha256(str(model)),
            "critic": LexiconCritic(constitution.load()),
            **own,
        }
    )


def train(model: Path, folder: Path, **given: Any) -> list[dict[str, Any]]:
    """Train, and return what was logged at each step."""
    made = task(model, folder, **given)
    load_method(made.config.method).train(made)
    return logged(folder)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_jsonl(Run(folder).metrics) if "loss" in record]


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of the adapter or model that a training left, in float64."""
    from safetensors.torch import load_file

    product = Run(folder).product
    assert product is not None
    (file,) = product.glob("*.safetensors")
    return {name: value.double() for name, value in load_file(file).items()}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """‖A - B‖ over all tensors."""
    assert one.keys() == other.keys()
    return float(sum(((one[k] - other[k]) ** 2).sum() for k in one) ** 0.5)


def log_probabilities(model: Any, tokenizer: Any, messages: Sequence[Any], text: str) -> Any:
    """log π of each token of an answer, from one forward pass over one text without padding."""
    import torch

    with torch.inference_mode():
        return log_likelihoods(model, tokenizer, messages, text).numpy()


def log_likelihoods(model: Any, tokenizer: Any, messages: Sequence[Any], text: str) -> Any:
    """The same as a tensor in float64, with its gradient."""
    import torch

    prompt = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": text}], return_dict=True
    )["input_ids"]
    scores = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    places = range(len(prompt), len(whole))
    return torch.stack([scores[i - 1, whole[i]] for i in places])


def gradient_norm(model: Path, folder: Path, loss: Callable[[Any, Any], Any]) -> float:
    """‖∇L‖ over the adapter that a training left in `folder`, in float64, of a loss that is not
    the trainer's; it is made sure that finite differences along ∇L say the same.

    Args:
        loss: of a model and its tokenizer, a tensor with its gradient.
    """
    import torch
    from peft import PeftModel

    from cai_scale.training.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(model))
    base = load_model(str(model), torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).double()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(loss(adapted, tokenizer), trained)
    norm = float(sum((part**2).sum() for part in gradient) ** 0.5)
    ends = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            for parameter, part in zip(trained, gradient, strict=True):
                parameter.add_(part, alpha=step / norm)
            ends.append(float(loss(adapted, tokenizer)))
            for parameter, part in zip(trained, gradient, strict=True):
                parameter.sub_(part, alpha=step / norm)
    assert abs((ends[0] - ends[1]) / 2e-4 / norm - 1) < 1e-4
    return norm
