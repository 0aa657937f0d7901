"""A saved adapter is reopened: each way of being damaged is caught."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from cai_scale.config import Config
from cai_scale.errors import IntegrityError, MissingError
from cai_scale.training.adapters import (
    CONFIG,
    WEIGHTS,
    adapter_shapes,
    check_adapter,
    leave_formats_to_autocast,
    lora,
)
from cai_scale.training.models import load_model

A, B = "m.q_proj.lora_A.weight", "m.q_proj.lora_B.weight"
SHAPES = {A: (4, 16), B: (16, 4)}


def adapter(folder: Path, **changes: Any) -> Path:
    tensors = {A: torch.ones(4, 16), B: torch.ones(16, 4)}
    for name, value in changes.items():
        key = {"a": A, "b": B}.get(name, name)
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"r": 4}))
    return folder


def test_a_sound_adapter_passes(tmp_path: Path) -> None:
    check_adapter(adapter(tmp_path), SHAPES)
    check_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"b": None}, "is missing"),
        ({"extra": torch.ones(1)}, "extra was not trained"),
        ({"a": torch.ones(4, 15)}, r"has shape \(4, 15\), expected \(4, 16\)"),
        ({"a": torch.ones(0)}, r"has shape \(0,\)"),
        ({"b": torch.zeros(16, 4)}, "every lora_B is zero"),
        ({"a": torch.full((4, 16), float("nan"))}, "NaN or Inf"),
    ],
)
def test_a_damaged_adapter_is_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(IntegrityError, match=expected):
        check_adapter(adapter(tmp_path, **changes), SHAPES)


def test_an_empty_tensor_is_caught_without_knowing_the_shapes(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is empty"):
        check_adapter(adapter(tmp_path, a=torch.ones(0)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-7]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"\x80\x04" + p.read_bytes()[2:]),
    ],
)
def test_a_file_that_is_not_safetensors(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    damage(adapter(tmp_path) / WEIGHTS)
    with pytest.raises(IntegrityError, match="is corrupt"):
        check_adapter(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    (adapter(tmp_path) / CONFIG).unlink()
    with pytest.raises(MissingError, match="has no adapter_config"):
        check_adapter(tmp_path)


def test_shapes_of_a_model_are_those_that_it_saves(tmp_path: Path, tiny_model: Path) -> None:
    from peft import get_peft_model

    from cai_scale.training.models import load_model

    model = get_peft_model(load_model(str(tiny_model), torch.float32), lora(Config(lora_r=4)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    shapes = adapter_shapes(model)
    # Seven projections in each of two layers, two matrices each; the head is left alone.
    assert len(shapes) == 28
    assert not any("lm_head" in name for name in shapes)
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path, shapes)


def test_autocast_alone_chooses_formats(tiny_model: Path) -> None:
    """The same numbers to the last bit, without the way to fp32 and back."""
    base = load_model(str(tiny_model), torch.bfloat16)
    model = get_peft_model(base, lora(Config(lora_r=4)))
    seen: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
        if name.endswith("lora_B.default"):
            torch.nn.init.normal_(module.weight)

    def results() -> list[torch.Tensor]:
        seen.clear()
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=torch.arange(3, 12)[None]).logits
        logits.float().square().sum().backward()
        return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]

    before = results()
    assert seen == {torch.float32}
    leave_formats_to_autocast(model)
    after = results()
    assert seen == {torch.bfloat16}
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
