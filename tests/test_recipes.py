"""Every bundled recipe: against the schema, and as a dry run on the meta device."""

import math
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from cai_scale import config as settings
from cai_scale.cli import train
from cai_scale.config import Config
from cai_scale.training import adapters
from cai_scale.training.batches import plan_batch
from processes import ROOT


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model as its publisher describes it.

    `linear` has the (inputs, outputs) of the linear layers in each of `layers` blocks. `weights`
    is the published count of all weights, by which the shape here is known to be that model's.
    """

    name: str
    kind: str
    layers: int
    linear: tuple[tuple[int, int], ...]
    weights: int
    vocabulary: int
    hidden: int
    given: dict[str, Any] = field(default_factory=dict)


def llama_like(
    name: str, kind: str, weights: int, hidden: int, inner: int, layers: int, heads: int,
    key_heads: int, vocabulary: int, *, tied: bool,
) -> Shape:  # fmt: skip
    narrow = hidden // heads * key_heads
    attention = ((hidden, hidden), (hidden, narrow), (hidden, narrow), (hidden, hidden))
    return Shape(
        name=name,
        kind=kind,
        layers=layers,
        linear=(*attention, (hidden, inner), (hidden, inner), (inner, hidden)),
        weights=weights,
        vocabulary=vocabulary,
        hidden=hidden,
        given={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": tied,
        },
    )


SMOLLM = llama_like(
    "smollm2-135m-q4", "Llama", 134_515_008, 576, 1536, 30, 9, 3, 49152, tied=True
)  # fmt: skip
GPT2 = Shape(
    name="openai-community/gpt2",
    kind="GPT2",
    layers=12,
    linear=((768, 3 * 768), (768, 768), (768, 4 * 768), (4 * 768, 768)),
    weights=124_439_808,
    vocabulary=50257,
    hidden=768,
)
QWEN_SMALL = llama_like(
    "Qwen/Qwen2.5-1.5B-Instruct", "Qwen2", 1_543_714_304, 1536, 8960, 28, 12, 2, 151936, tied=True
)
LLAMA = llama_like(
    "meta-llama/Llama-3.1-8B-Instruct", "Llama", 8_030_261_248, 4096, 14336, 32, 32, 8, 128256,
    tied=False,
)  # fmt: skip
QWEN_LARGE = llama_like(
    "Qwen/Qwen2.5-72B-Instruct", "Qwen2", 72_706_203_648, 8192, 29568, 80, 64, 8, 152064,
    tied=False,
)  # fmt: skip

# Each recipe's model, the ranks that it is meant for, and (rows at once on a rank, how often).
EXPECTED = {
    "quick.yaml": (SMOLLM, 1, (8, 1)),
    "dpo.yaml": (SMOLLM, 1, (8, 1)),
    "sft.yaml": (SMOLLM, 1, (8, 1)),
    "reward.yaml": (SMOLLM, 2, (4, 1)),
    "rlaif.yaml": (SMOLLM, 2, (4, 1)),
    "grpo.yaml": (SMOLLM, 1, (8, 8)),
    "source-rlaif.yaml": (GPT2, 1, (8, 1)),
    "source-dpo.yaml": (GPT2, 1, (8, 1)),
    "vietnamese.yaml": (QWEN_SMALL, 1, (8, 1)),
    "llama-3.1-8b-8gpu.yaml": (LLAMA, 8, (2, 4)),
    "qwen-72b-multinode.yaml": (QWEN_LARGE, 16, (1, 4)),
}
METHODS = {"rlaif": "rlaif", "source-rlaif": "rlaif", "sft": "sft", "reward": "reward"}


def bundled() -> list[str]:
    folder = resources.files("cai_scale.launch").joinpath("recipes")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(name: str) -> Config:
    return settings.from_dict(settings.read_recipe(name), f"recipe {name}")


def built(shape: Shape, config: Config) -> Any:
    """The model that the recipe trains, without a byte of weights."""
    import torch
    import transformers
    from peft import get_peft_model

    own = getattr(transformers, f"{shape.kind}Config")(**shape.given)
    with torch.device("meta"):
        if config.method == "reward":
            own.num_labels, own.pad_token_id = 1, 0
            model = transformers.AutoModelForSequenceClassification.from_config(own)
            lora = adapters.lora(config, task="SEQ_CLS", whole=["score"])
        else:
            model = transformers.AutoModelForCausalLM.from_config(own)
            lora = adapters.lora(config)
        return get_peft_model(model, lora) if config.lora else model


def count(parameters: Any) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def test_every_recipe_is_expected() -> None:
    assert bundled() == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_runs_dry(name: str) -> None:
    import torch

    shape, ranks, (at_once, times) = EXPECTED[name]
    config = load(name)
    assert config.model == shape.name
    assert config.method == METHODS.get(Path(name).stem, "grpo" if name == "grpo.yaml" else "dpo")
    if config.ds_config is not None:
        stage = settings.read_ds_config(config.ds_config)["zero_optimization"]["stage"]
        assert f"zero{stage}.json" == config.ds_config
    rows = config.batch_size * (config.samples if config.method == "grpo" else 1)
    plan = plan_batch(rows, config.micro_batch_size, ranks)
    assert (plan.per_rank, plan.accumulation) == (at_once, times)

    model = built(shape, config)
    trainable = count(p for p in model.parameters() if p.requires_grad)
    frozen = count(p for p in model.parameters() if not p.requires_grad)
    lora = shape.layers * sum(config.lora_r * (a + b) for a, b in shape.linear)
    if not config.lora:
        assert (trainable, frozen) == (shape.weights, 0)
    elif config.method == "reward":  # its head is trained whole, beside the one that it replaces
        assert (trainable, frozen) == (lora + shape.hidden, shape.weights + shape.hidden)
    else:
        assert (trainable, frozen) == (lora, shape.weights)

    with torch.device("meta"):
        tokens = torch.zeros(plan.per_rank, config.max_length, dtype=torch.long)
        logits = model(input_ids=tokens, attention_mask=None).logits
    assert logits.is_meta
    outputs = (1,) if config.method == "reward" else (config.max_length, shape.vocabulary)
    assert tuple(logits.shape) == (plan.per_rank, *outputs)


def test_the_count_of_weights_can_fail() -> None:
    """The control: another rank of LoRA, or one layer more, has another count."""
    lora = SMOLLM.layers * sum(16 * (a + b) for a, b in SMOLLM.linear)
    for shape, config in (
        (SMOLLM, Config(lora_r=8)),
        (
            Shape(**(vars(SMOLLM) | {"given": SMOLLM.given | {"num_hidden_layers": 31}})),
            Config(),
        ),
    ):
        model = built(shape, config)
        assert count(p for p in model.parameters() if p.requires_grad) != lora


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_says_how_to_start_it_and_whether_it_was_run(name: str) -> None:
    path = ROOT / "launch" / "recipes" / name
    comments = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(comments)
    assert f"launch/train.py --recipe {name}" in text
    assert ("Not run here" in text) != ("Run here: see EXPERIMENTS.md" in text)
    assert all(len(line) <= 100 for line in path.read_text("utf-8").splitlines())


def test_an_unknown_key_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epoch: 3\n", encoding="utf-8")
    assert train(["--recipe", str(recipe)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: recipe {recipe}: unknown key 'epoch'; known: ")


def mentions(text: str) -> set[str]:
    """The recipes that a text names, by path, as a flag, or in their own folder."""
    return set(re.findall(r"(?:recipes/|--recipe )([\w.-]+\.yaml)", text))


def test_documents_name_recipes_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "launch" / "recipes").glob("*.yaml")]
    found = {doc.name: mentions(doc.read_text("utf-8")) for doc in documents}
    assert "quick.yaml" in found["README.md"]
    for name, recipes in found.items():
        assert recipes <= set(bundled()), name
    assert mentions("`--recipe fast.yaml`") - set(bundled()) == {"fast.yaml"}  # the control
