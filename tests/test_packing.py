"""Packed forward passes: the states, losses and gradients of padded ones, for fewer tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cai_scale.training import packing
from cai_scale.training.packing import FAMILIES, pack
from cai_scale.training.positions import positions
from tests.tasks import answers, pairs, train, weights
from tests.tasks import distance as distance_of

SIZES = {
    "vocab_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
GPT2 = {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def tiny(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    own = GPT2 if family == "gpt2" else LLAMA
    config = AutoConfig.for_model(family, **SIZES, **own, **settings)
    return AutoModelForCausalLM.from_config(config).train()


def batch() -> tuple[Tensor, Tensor]:
    """Rows of 15, 18, 16, 20 and 7 tokens, padded on either side; two and two begin alike, and one
    is the beginning of another."""
    ids = torch.randint(3, 64, (5, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :9] = ids[0, :9]
    mask[0, 15:] = mask[1, 18:] = mask[2, :4] = mask[4, 7:] = 0
    ids[3, :6] = ids[2, 4:10]
    ids[4] = ids[3]
    return ids, mask


def different(ids: Tensor, mask: Tensor) -> int:
    """How many different tokens there are: by all that comes before a token in its row."""
    rows = [row[own.bool()].tolist() for row, own in zip(ids, mask, strict=True)]
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def states(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The last states of the real tokens, and the gradients of a weighted sum of them."""
    model.zero_grad()
    found = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
    ).last_hidden_state
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights * mask[..., None]).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found.detach()[mask.bool()], gradients


def distance(model: Any, ids: Tensor, mask: Tensor) -> float:
    """How far packing takes states and gradients from where they were."""
    (before, expected), _ = states(model, ids, mask), packing.install(model)
    after, found = states(model, ids, mask)
    away = [(found[n] - g).norm() / (g.norm() + 1e-9) for n, g in expected.items()]
    return float(max((after - before).abs().max(), *away))


def test_what_rows_share_is_found_once() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 5, 6, 9], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
    found = pack(ids, mask)
    assert ids.flatten()[found.tokens].tolist() == [5, 6, 7, 8, 9]
    assert found.positions.tolist() == [0, 1, 2, 3, 2]
    assert found.rows.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0], [0, 1, 0, 0]]
    assert found.rows.flatten()[found.first].tolist() == [0, 1, 2, 3, 4]
    assert found.spread.tolist() == [[0, 1, 2, 3], [0, 0, 1, 4], [0, 1, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_there_once(seed: int) -> None:
    """Random rows over two tokens, which share much, against a count of their beginnings."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (8, 12), generator=generator)
    lengths = torch.randint(1, 13, (8,), generator=generator)
    mask = (torch.arange(12) < lengths[:, None]).long()
    mask[::2] = mask[::2].flip(1)
    found = pack(ids, mask)
    assert len(found.tokens) == different(ids, mask)
    assert torch.equal(ids.flatten()[found.tokens][found.spread][mask.bool()], ids[mask.bool()])
    assert torch.equal(found.positions[found.spread][mask.bool()], positions(mask)[mask.bool()])
    assert torch.equal(found.rows.flatten()[found.first], torch.arange(len(found.tokens)))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_padded_rows(family: str) -> None:
    model = tiny(family)
    seen = []
    model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].numel()),
        with_kwargs=True,
    )
    assert distance(model, *batch()) < 1e-5
    assert seen == [100, different(*batch())]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_for_all_is_not(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: tokens that also see those of other rows."""

    def careless(*args: Any, packing: Any = None, **kwargs: Any) -> Any:
        kept = (*args[:4], args[4] if packing is None else None)
        return REAL(*kept, **kwargs)

    monkeypatch.setattr(packing, "attention", careless)
    assert distance(tiny(family), *batch()) > 1e-3


REAL = packing.attention


def test_checkpointed_layers_are_packed_again() -> None:
    model = tiny("llama")
    model.gradient_checkpointing_enable()
    assert distance(model, *batch()) < 1e-5


@pytest.mark.parametrize(("window", "computed"), [(20, "different"), (19, "all")])
def test_a_row_over_the_window_leaves_a_batch_padded(window: int, computed: str) -> None:
    model = tiny("mistral", sliding_window=window)
    ids, mask = batch()
    assert distance(model, ids, mask) < 1e-5
    kwargs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    _, given = packing._pack(model.base_model, (), kwargs)
    assert given["input_ids"].numel() == (different(ids, mask) if computed == "different" else 100)


def test_another_attention_or_family_stays_as_it_is() -> None:
    for family, settings in (("gemma2", {}), ("olmo2", {}), ("llama", {"attn": "eager"})):
        model = tiny(family)
        if settings:
            model.set_attn_implementation("eager")
        before = model.config._attn_implementation
        packing.install(model)
        assert model.config._attn_implementation == before != packing.ATTENTION


def test_answers_of_a_packed_model_are_the_same() -> None:
    model = tiny("llama").eval()
    ids, mask = batch()
    ids, mask = ids[2:4], mask[2:4]  # padded on the left, as generate has it

    def answered() -> list[Any]:
        found: list[Any] = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
        ).tolist()
        return found

    before = answered()
    packing.install(model)
    assert answered() == before


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attention_by_products_is_attention(heads: int) -> None:
    """Values and gradients in fp32, against torch's own; bf16 no further than torch's bf16."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, n, 11, 8) for n in (4, heads, heads)]
    given = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weights = torch.randn(3, 11, 4, 8, generator=generator)

    def torchs(*states: Tensor) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*states, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)

    def products(*states: Tensor) -> Tensor:
        return packing.by_products(*states, scaling=0.3)

    def results(function: Any, dtype: torch.dtype) -> list[Tensor]:
        output = function(*(one.to(dtype) for one in given))
        return [output.float(), *torch.autograd.grad((output.float() * weights).sum(), given)]

    expected = results(torchs, torch.float32)
    for one, other in zip(expected, results(products, torch.float32), strict=True):
        assert float((one - other).abs().max()) < 1e-5
    theirs, own = results(torchs, torch.bfloat16), results(products, torch.bfloat16)
    for exact, one, other in zip(expected, theirs, own, strict=True):
        assert float((other - exact).norm()) < 1.5 * float((one - exact).norm()) + 1e-3


GIVEN: dict[str, Any] = {
    "dpo": {"pairs": pairs()},
    "sft": {"answers": answers()},
    "reward": {"answers": answers()},
    "rlaif": {"answers": answers()},
}


@pytest.mark.parametrize("method", GIVEN)
def test_a_packed_training_is_the_training(
    method: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a training of padded rows, and one whose shared tokens are not told apart."""
    packed = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal packed
        packed += kwargs.get("packing") is not None
        return REAL(*args, **kwargs)

    def trained(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        logs = train(tiny_model, tmp_path / name, method=method, steps=4, **GIVEN[method])
        return logs, weights(tmp_path / name)

    monkeypatch.setattr(packing, "attention", counted)
    logs, own = trained("packed")
    assert packed
    monkeypatch.setattr(packing, "FAMILIES", ())
    expected, padded = trained("padded")
    monkeypatch.setattr(packing, "FAMILIES", FAMILIES)
    monkeypatch.setattr(packing, "_shared", lambda one, other: min(len(one), len(other)) - 2)
    _, wrong = trained("wrong")

    for one, other in zip(logs, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6)
    assert distance_of(own, padded) < 1e-3 * distance_of(wrong, padded)
