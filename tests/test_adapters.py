"""A saved adapter is reopened: each way of being damaged is caught."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cai_scale.config import Config
from cai_scale.errors import IntegrityError, MissingError
from cai_scale.training.adapters import CONFIG, WEIGHTS, adapter_shapes, check_adapter, lora

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
