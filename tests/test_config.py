import argparse
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from cai_scale import config
from cai_scale.cli import train_parser
from cai_scale.config import Config
from cai_scale.errors import ConfigError, MissingError
from cai_scale.training.batches import BatchPlan, plan_batch

DS_CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


def test_settings_survive_a_round_trip_through_json() -> None:
    import json

    changed = Config(temperatures=(0.5, 0.9, 1.2), constitution="c.yaml", epochs=3.0)
    assert config.from_dict(json.loads(json.dumps(changed.to_dict())), "x") == changed


def test_every_setting_has_a_flag_with_help() -> None:
    text = " ".join(train_parser("x").format_help().split())
    for name in Config.__dataclass_fields__:
        assert f"--{name}" in text
    assert "(default: 0.7 1.0)" in text


def test_flags_are_parsed_to_their_kinds() -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    found = parser.parse_args(
        [
            *("--temperatures", "0.5", "1", "--samples", "6"),
            *("--learning_rate", "1e-3", "--gradient_checkpointing"),
        ]
    )
    assert config.from_dict(vars(found), "flags") == Config(
        temperatures=(0.5, 1.0), samples=6, learning_rate=1e-3, gradient_checkpointing=True
    )


def test_yaml_reads_an_exponent_without_a_dot_as_text() -> None:
    assert config.from_dict({"learning_rate": "2e-4"}, "r").learning_rate == 2e-4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"epoch": 3}, "r.yaml: unknown key 'epoch'"),
        ({"epochs": "many"}, "r.yaml: epochs: 'many': expected float"),
        ({"samples": 2.5}, "r.yaml: samples: 2.5: expected int"),
        ({"samples": True}, "r.yaml: samples: True: expected int"),
        ({"model": 5}, "r.yaml: model: 5: expected str"),
        ({"samples": 0}, "--samples 0: expected a number of at least 1"),
        ({"samples": 1}, "--samples 1: dpo compares the answers to a prompt; ask for 2 or more"),
        ({"samples": 1, "method": "grpo"}, "--samples 1: grpo compares"),
        (
            {"samples": 1, "method": "reward", "objective": "bradley-terry"},
            "--samples 1: reward compares",
        ),
        ({"reward_weight": -0.1}, "--reward_weight -0.1: expected a number of at least 0"),
        ({"loss_margin": float("nan")}, "--loss_margin nan: expected a finite number"),
        ({"loss": "squared"}, "unknown loss 'squared'; choose one of: sigmoid, margin"),
        ({"beta": 0}, "--beta 0.0: expected a number above 0 with dpo"),
        ({"rounds": 0}, "--rounds 0: expected a number of at least 1"),
        ({"steps": 0}, "--steps 0: expected a number of at least 1"),
        ({"guard_steps": -1}, "--guard_steps -1: expected a number of at least 0"),
        (
            {"evaluator": "lexicon:half", "method": "reward"},
            "--evaluator lexicon:half with --method",
        ),
        ({"guard_steps": 8, "method": "reward"}, "--guard_steps: a guard scores the answers of"),
        (
            {"guard_steps": 8, "critic": "judge", "judge_mode": "pairwise"},
            "--guard_steps: a guard scores the answers of",
        ),
        ({"qlora": True, "lora": False}, "--qlora with --no-lora"),
        (
            {"objective": "bradley-terry", "reward_outputs": "principles"},
            "--reward_outputs principles with --objective bradley-terry",
        ),
        ({"sampler": "openai"}, "--sampler openai without --sampler_url"),
        ({"sampler_url": "http://h/v1"}, "--sampler auto with --sampler_url"),
        ({"epochs": float("nan")}, "--epochs nan"),
        ({"learning_rate": float("inf")}, "--learning_rate inf"),
        ({"temperatures": [0.7, -1]}, "--temperatures (0.7, -1.0)"),
        ({"temperatures": []}, "--temperatures: expected at least one"),
        ({"top_p": 0}, "--top_p 0"),
        ({"method": "ppo"}, "unknown method 'ppo'; choose one of: dpo"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
    ],
)
def test_bad_settings_are_named(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_dict(values, "r.yaml")
    assert expected in str(caught.value)


def test_recipes_are_found_checked_and_hold_differences_only() -> None:
    folder = resources.files("cai_scale.launch").joinpath("recipes")
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    assert "quick.yaml" in names
    default = Config().to_dict()
    for name in names:
        values = config.read_recipe(name)
        found = config.from_dict(values, name).to_dict()
        # The method may be named though it is the default: that is the recipe's title.
        same = [key for key in values if key != "method" and found[key] == default[key]]
        assert same == [], f"{name} repeats the defaults of {same}"


def test_every_ds_config_loads_with_its_stage_and_auto_sizes() -> None:
    for name in DS_CONFIGS:
        values = config.read_ds_config(f"{name}.json")
        zero = values["zero_optimization"]
        assert zero["stage"] == int(name[4])
        assert ("offload_optimizer" in zero) is name.endswith("offload")
        assert "optimizer" not in values
        for key in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        ):
            assert values[key] == "auto"


def test_a_ds_config_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert config.read_ds_config(str(path)) == {"zero_optimization": {"stage": 1}}


def test_unknown_or_malformed_ds_configs(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        config.read_ds_config("zero9.json")
    for name in DS_CONFIGS:
        assert f"{name}.json" in str(caught.value)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        config.read_ds_config(str(bad))
    for content, said in (
        ('{"zero_optimization": [2]}', "expected an object with a stage"),
        ('{"zero_optimization": {"stage": 9}}', "expected an object with a stage"),
        ('{"zero_optimisation": {"stage": 2}}', "expected an object with a stage"),
        ('{"gradient_clipping": NaN}', "NaN is not a JSON number"),
        ('{"a":' * 100_000, "is not JSON"),
        ('{"zero_optimization": {"stage": 1}, "train_batch_size": 3}', "sizes come from"),
    ):
        bad.write_text(content)
        with pytest.raises(ConfigError, match=said):
            config.read_ds_config(str(bad))
    bad.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        config.read_ds_config(str(bad))


@pytest.mark.parametrize(
    ("batch", "micro", "world", "plan"),
    [
        (8, 4, 1, BatchPlan(4, 2)),
        (8, 4, 2, BatchPlan(4, 1)),
        (8, 3, 2, BatchPlan(2, 2)),
        (6, 4, 1, BatchPlan(3, 2)),
        (7, 4, 1, BatchPlan(1, 7)),
        (2, 64, 2, BatchPlan(1, 1)),
    ],
)
def test_the_global_batch_is_the_same_for_any_number_of_ranks(
    batch: int, micro: int, world: int, plan: BatchPlan
) -> None:
    assert plan_batch(batch, micro, world) == plan
    assert plan.per_rank * plan.accumulation * world == batch


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="--batch_size 7 does not divide over 2 ranks"):
        plan_batch(7, 4, 2)
