"""Reward models: right in any padding, the head kept, the graphs' gates, and the runtime."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cai_export import reward, scorer, scorer_parity
from cai_export.fuse import fuse_scorer
from cai_export.quantise import quantise
from cai_export.scorer_parity import Texts
from torch import nn

from cai_scale import constitution
from cai_scale.errors import CaiError, ConfigError, DataError, GateError, IntegrityError
from cai_scale.records import read_json, sha256, write_json
from cai_scale.runtime import bundle as layout
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.graph import open_session, pad
from cai_scale.runtime.reward import RewardModel, ScorerGraph, batches
from cai_scale.training.models import load_scorer
from cai_scale.training.scorer import Scorer
from processes import run_python
from tiny import save_tiny_scorer

OVERALL = ("overall",)
PRINCIPLES = tuple(p.id for p in constitution.load().principles)
END = 2  # <|im_end|>, which is the pad token too
RANDOM = np.random.default_rng(0)
# Many end with the end of a message, which transformers takes for padding.
ROWS = [
    [*RANDOM.integers(3, 600, size).tolist(), *([END] if size % 2 else [])]
    for size in RANDOM.integers(4, 60, 120)
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny scorer of four labels in torch, and the folder of its graphs."""
    folder = tmp_path_factory.mktemp("scorer")
    labels = tuple(reversed(PRINCIPLES))
    saved = save_tiny_scorer(folder / "model", labels, kind=request.param)
    source = reward.find(saved, constitution.load())
    assert (source.labels, source.adapter) == (labels, None)
    model = reward.load(source, ROWS[:2]).model
    files = scorer.write_graphs(model, folder)
    kinds = {"graph", "fused"} if request.param == "llama" else {"graph"}
    assert files.keys() == {"fp32", "q8"}
    assert all(found.keys() == kinds for found in files.values())
    return model, folder / "onnx"


def theirs(model: Any, rows: list[list[int]]) -> Any:
    """transformers' own scores: each row alone, the head applied to the last token by hand."""
    with torch.inference_mode():
        states = [
            model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows
        ]
        return torch.stack([model.score(state) for state in states]).numpy()


@pytest.mark.parametrize("left", [False, True])
def test_torch_and_graph_score_the_last_token_in_any_padding(exported: Any, left: bool) -> None:
    model, folder = exported
    expected = theirs(model, ROWS[:12])
    tokens, mask = pad(ROWS[:12], left=left)
    tokens[mask == 0] = END
    with torch.inference_mode():
        ours = Scorer(model)(torch.tensor(tokens), torch.tensor(mask))["logits"].numpy()
    assert np.abs(ours - expected).max() < 1e-4
    graph = ScorerGraph(folder / "model.onnx")
    assert np.abs(graph.run(tokens, mask) - expected).max() < 1e-4
    # The control: transformers' pooling by the pad token, and its positions by the column.
    with torch.inference_mode():
        pooled = model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)
        ).logits.numpy()
    assert np.abs(pooled - expected).max() > 0.1


def test_the_graph_has_the_names_and_axes_of_the_contract(exported: Any) -> None:
    _, folder = exported
    for name in ("model.onnx", "model_quantized.onnx"):
        graph = onnx.load(str(folder / name), load_external_data=False).graph
        found = {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in [*graph.input, *graph.output]
        }
        assert found == {
            "input_ids": ["batch_size", "sequence_length"],
            "attention_mask": ["batch_size", "sequence_length"],
            "logits": ["batch_size", 4],
        }
        (head,) = (node for node in graph.node if "logits" in node.output)
        assert head.op_type in ("Gemm", "MatMul")
        assert sum(node.op_type == "Softmax" for node in graph.node) == 2  # one a layer


class PooledByPad(Scorer):
    """A scorer with the usual defect: it pools at the last token that is not the pad token."""

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return super().forward(input_ids, attention_mask * (input_ids != END))


class ColumnPositions(Scorer):
    """A scorer with another: a row's positions count its padding."""

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        columns = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=columns
        )
        last = attention_mask.cumsum(-1).argmax(-1)
        rows = torch.arange(input_ids.shape[0])
        return {"logits": self.head(states.last_hidden_state[rows, last])}


@pytest.mark.parametrize("fault", [PooledByPad, ColumnPositions])
def test_the_exact_gate_catches_the_usual_defects(
    exported: Any, monkeypatch: pytest.MonkeyPatch, fault: type[Scorer]
) -> None:
    model, folder = exported
    if fault is ColumnPositions and model.config.model_type == "llama":
        pytest.skip("rotary positions are relative: a shift of all of them changes nothing")
    texts = Texts(model, ROWS[:12])
    good = scorer_parity.check_exact("graph", folder / "model.onnx", texts)
    assert set(good["max_abs_delta"]) == {"alone", "left", "right"}
    assert 0 < max(good["max_abs_delta"].values()) < 1e-4
    broken = fault(model)

    def run(self: ScorerGraph, tokens: Any, mask: Any) -> Any:
        with torch.inference_mode():
            return broken(torch.tensor(tokens), torch.tensor(mask))["logits"].numpy()

    monkeypatch.setattr(ScorerGraph, "run", run)
    with pytest.raises(GateError, match="differs from torch"):
        scorer_parity.check_exact("graph", folder / "model.onnx", texts)


def test_the_close_gate_has_bounds_and_fails_closed(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = exported
    path, texts = folder / "model_quantized.onnx", Texts(model, ROWS)
    found = scorer_parity.check_close("graph", path, texts)
    assert found["texts"] == 120
    assert 0.99 <= found["spearman"] <= 1
    assert found["alone_against_batch"] < 0.05
    with pytest.raises(GateError, match="12 texts are too few"):
        scorer_parity.check_close("graph", path, Texts(model, ROWS[:12]))
    run = ScorerGraph.run
    faults = {
        "nan": lambda logits: logits * np.where(np.arange(len(logits)) == 0, np.nan, 1)[:, None],
        "constant": np.zeros_like,
        "one label constant": lambda logits: logits * [1, 1, 0, 1],
        "one label reversed": lambda logits: logits * [1, 1, 1, -1],
    }
    for change in faults.values():
        monkeypatch.setattr(ScorerGraph, "run", lambda *a, c=change: c(run(*a)))
        with pytest.raises(GateError, match="Spearman"):
            scorer_parity.check_close("graph", path, texts)


@pytest.fixture
def fused(exported: Any) -> Any:
    model, folder = exported
    if model.config.model_type != "llama":
        pytest.skip("has no fused graph")
    return model, folder


def test_the_fused_graph_scores_rows_padded_on_the_right(fused: Any) -> None:
    model, folder = fused
    expected = theirs(model, ROWS[:12])
    graph = ScorerGraph(folder / "fused.onnx")
    assert np.abs(graph.run(*pad(ROWS[:1])) - expected[:1]).max() < 1e-4
    tokens, mask = pad(ROWS[:12])
    tokens[mask == 0] = END
    assert np.abs(graph.run(tokens, mask) - expected).max() < 1e-4
    # The control: padded on the left it is wrong, so the gate does not ask it.
    assert np.abs(graph.run(*pad(ROWS[:12], left=True)) - expected).max() > 0.1
    exact = scorer_parity.check_exact("fused", folder / "fused.onnx", Texts(model, ROWS[:12]))
    assert exact["max_abs_delta"].keys() == {"alone", "right"}
    with pytest.raises(GateError, match="fp32 graph differs from torch"):
        scorer_parity.check_exact("graph", folder / "fused.onnx", Texts(model, ROWS[:12]))


def test_the_fused_graph_caches_nothing_and_shares_the_weights(fused: Any) -> None:
    model, folder = fused
    for name, first in (
        ("fused.onnx", "model.onnx"),
        ("fused_quantized.onnx", "model_quantized.onnx"),
    ):
        graph = onnx.load(str(folder / name), load_external_data=False).graph
        assert [v.name for v in graph.input] == ["input_ids", "attention_mask"]
        assert [v.name for v in graph.output] == ["logits"]
        attention = [n for n in graph.node if n.op_type == "GroupQueryAttention"]
        assert len(attention) == model.config.num_hidden_layers
        assert all(len(n.output) == 1 and list(n.input[3:5]) == ["", ""] for n in attention)
        stored = [i for i in graph.initializer if i.external_data]
        assert {e.value for i in stored for e in i.external_data if e.key == "location"} == {
            f"{first}_data"
        }
    caches = 2 * 4 * model.config.max_position_embeddings * 8  # sines and cosines, for 8 angles
    parameters = sum(p.nbytes for p in model.parameters())
    assert (folder / "model.onnx_data").stat().st_size < 1.1 * parameters + caches


def test_products_in_integers_lose_little_beside_their_weights(tmp_path: Path) -> None:
    import onnx_ir
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(1)
    weight = random.normal(size=(96, 40)).astype(np.float32)
    weight[:, 0] = 0
    # Tokens of very different sizes, an activation that stands out, and a row of zeros.
    left = random.normal(size=(2, 5, 96)) * 10.0 ** np.arange(-4, 6).reshape(2, 5, 1)
    left[..., 7] *= 40
    left[1, 4] = 0
    left = left.astype(np.float32)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, size])
        for name, size in (("x", 96), ("y", 40))
    ]
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph(
        [product], "product", values[:1], values[1:], [numpy_helper.from_array(weight, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (quantised,) = quantise([onnx_ir.from_proto(model)], 8, "columns")
    onnx_ir.save(quantised, tmp_path / "product.onnx")
    found = open_session(tmp_path / "product.onnx").run(["y"], {"x": left})[0]

    step = np.abs(weight).max(0) / 127
    rounded = np.round(weight / np.where(step == 0, 1, step)) * step
    largest = np.abs(left).max(-1, keepdims=True)
    # Each activation may be off by half a step of the low part: the row's largest / 126 / 126.
    bound = largest * np.abs(rounded).sum(0) / (2 * 126 * 63) * 1.01
    assert (np.abs(found - left.astype(np.float64) @ rounded) <= bound).all()
    # The control: the high part alone.
    high = np.round(left / np.where(largest == 0, 1, largest) * 63) * largest / 63
    assert (np.abs(high @ rounded - left @ rounded) > bound).mean() > 0.5


def test_architectures_without_a_fused_graph_have_none() -> None:
    from transformers import Gemma2Config, Gemma2ForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    assert fuse_scorer(Gemma2ForSequenceClassification(Gemma2Config(**sizes, **heads))) is None


def test_rank_statistics_by_hand() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert scorer_parity.spearman(a, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.8)
    # Equal values share ranks 1.5 and 1.5: covariance 4.5, variances 5 and 4.5.
    tied = scorer_parity.spearman(a, np.array([0.0, 5.0, 5.0, 9.0]))
    assert tied == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert np.isnan(scorer_parity.spearman(a, np.ones(4)))
    assert scorer_parity.order_agreement(a, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(5 / 6)
    assert np.isnan(scorer_parity.order_agreement(np.ones(4), a))


@pytest.fixture(scope="module")
def reward_run(finished_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a reward model leaves: `finished_run`'s records and a SEQ_CLS adapter."""
    from peft import LoraConfig, get_peft_model

    path = tmp_path_factory.mktemp("runs") / "reward"
    path.mkdir()
    for file in (finished_run.config, finished_run.constitution, finished_run.summary):
        shutil.copy(file, path)
    torch.manual_seed(1)
    base = load_scorer(finished_run.settings()["model"], torch.float32, PRINCIPLES, new_head=True)
    nn.init.normal_(base.score.weight, std=0.3)
    settings = LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        init_lora_weights=False,  # random, as if trained
    )
    get_peft_model(base, settings).save_pretrained(path / "adapter")
    return path


@pytest.fixture
def copy(reward_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reward_run, tmp_path / "reward"))


@pytest.fixture(scope="module")
def trained(tiny_constitution: Path) -> Any:
    return constitution.load(tiny_constitution)


def change_adapter(run: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def head_of(run: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")[reward.ADAPTED_HEAD]


def test_the_head_survives_the_merge(reward_run: Path, trained: Any) -> None:
    found = reward.load(reward.find(reward_run, trained), ROWS[:6])
    assert found.labels == PRINCIPLES
    assert 0 < found.max_delta < 1e-3
    assert torch.equal(found.model.score.weight, head_of(reward_run))
    assert not any("lora" in name for name, _ in found.model.named_parameters())
    # Its scores are those of the adapter, loaded here by peft alone.
    from peft import AutoPeftModelForSequenceClassification

    adapted = AutoPeftModelForSequenceClassification.from_pretrained(
        reward_run / "adapter", num_labels=4
    ).eval()
    expected = theirs(adapted.base_model.model, ROWS[:6])
    assert np.abs(theirs(found.model, ROWS[:6]) - expected).max() < 1e-4


def test_a_head_that_is_replaced_or_moves_is_caught(
    reward_run: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: merging as it goes wrong, with a fresh head and with other weights."""
    from peft.tuners.lora import LoraModel

    source = reward.find(reward_run, trained)
    merge = LoraModel.merge_and_unload

    def fresh_head(self: Any, **options: Any) -> Any:
        merged = merge(self, **options)
        nn.init.normal_(merged.score.weight)
        return merged

    def no_adapter(self: Any, **options: Any) -> Any:
        return self.unload()

    for broken, said in ((fresh_head, "did not survive"), (no_adapter, "moved a reward")):
        monkeypatch.setattr(LoraModel, "merge_and_unload", broken)
        with pytest.raises(GateError, match=said):
            reward.load(source, ROWS[:6])


def refused(path: Path, rules: Any, kind: type[CaiError], said: str) -> None:
    with pytest.raises(kind, match=said) as error:
        reward.find(path, rules)
    assert "\n" not in str(error.value)


def test_a_run_that_is_no_reward_model_is_refused_unloaded(
    copy: Path, finished_run: Any, trained: Any, tmp_path: Path
) -> None:
    assert reward.find(copy, trained).labels == PRINCIPLES
    refused(tmp_path, trained, CaiError, "no config.json")
    refused(finished_run.path, trained, ConfigError, "an adapter for 'CAUSAL_LM'")
    other = replace(trained, data={**trained.data, "name": "other"}, name="other")
    refused(copy, other, ConfigError, "another constitution")
    head = head_of(copy)
    change_adapter(copy, lambda tensors: tensors.update({reward.ADAPTED_HEAD: head[:3].clone()}))
    refused(copy, trained, IntegrityError, "3 outputs")
    change_adapter(copy, lambda tensors: tensors.update({reward.ADAPTED_HEAD: head[:1].clone()}))
    assert reward.find(copy, trained).labels == OVERALL
    change_adapter(copy, lambda tensors: tensors.pop(reward.ADAPTED_HEAD))
    refused(copy, trained, IntegrityError, "no score head")


def test_a_folder_that_is_no_reward_model_is_refused_unloaded(
    tmp_path: Path, tiny_model: Path
) -> None:
    rules = constitution.load()
    refused(tiny_model, rules, ConfigError, "is a LlamaForCausalLM")
    folder = save_tiny_scorer(tmp_path / "model", OVERALL)
    assert reward.find(folder, rules).labels == OVERALL
    config = read_json(folder / "config.json")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"auto_map": {"AutoModel": "code.Model"}}, "code of its own"),
        ({"id2label": {"0": "LABEL_0"}}, "LABEL_0: expected overall"),
        ({"id2label": {str(i): p for i, p in enumerate(PRINCIPLES)}}, "1 outputs"),
    ]
    for change, said in changes:
        write_json(folder / "config.json", {**config, **change})
        refused(folder, rules, CaiError, said)
    write_json(folder / "config.json", config)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, rules, CaiError, r"no \.safetensors")


def test_a_folder_whose_head_was_lost_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny_scorer(tmp_path / "model", OVERALL)
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, constitution.load(), IntegrityError, "no score head")
    with pytest.raises(IntegrityError, match=r"lacks weights, score\.weight"):
        load_scorer(str(folder), torch.float32, OVERALL)


@pytest.fixture(scope="module")
def scoring(
    finished_run: Any, reward_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The bundle of `finished_run` with a reward model."""
    path = tmp_path_factory.mktemp("bundles") / "scoring"
    flags = ("--run", str(finished_run.path), "--reward", str(reward_run), "--output", str(path))
    result = run_python("-m", "cai_export.cli", "--merge-lora", *flags)
    assert result.returncode == 0, result.stderr
    assert "reward model: fp32 max" in result.stdout
    yield path


def test_the_bundle_says_that_it_has_a_reward_model(scoring: Path) -> None:
    manifest = read_json(scoring / layout.MANIFEST)
    assert manifest["scorer"] == "reward"
    assert manifest["reward"] == {
        "variants": layout.REWARD_VARIANTS,
        "default": "q8",
        "labels": list(PRINCIPLES),
    }
    config = read_json(scoring / "reward" / "config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {str(i): p for i, p in enumerate(PRINCIPLES)}
    assert config["label2id"] == {p: i for i, p in enumerate(PRINCIPLES)}
    assert config["max_position_embeddings"] == 1024
    parity = read_json(scoring / layout.PARITY)["reward"]
    assert 0 < parity["merge"]["max_abs_delta"] <= 1e-3
    for kind in ("graph", "fused"):
        assert 0 < max(parity["fp32"][kind]["max_abs_delta"].values()) <= 1e-4
        assert parity["q8"][kind]["texts"] >= 100
        assert 0.99 <= parity["q8"][kind]["spearman"] <= 1
    card = (scoring / layout.README).read_text()
    assert "reward model in this bundle (harmless" in card
    files = {p.name for p in (scoring / "reward").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files


def test_the_runtime_reads_the_fused_graph_where_there_is_one(scoring: Path) -> None:
    bundle = open_bundle(scoring)
    for variant, files in layout.REWARD_VARIANTS.items():
        assert bundle.reward_graph(variant) == scoring / files["fused"]
        assert files["fused"] in bundle.manifest["files"]
    without = json.loads(json.dumps(bundle.manifest))
    for files in without["reward"]["variants"].values():
        del files["fused"]
    alone = replace(bundle, manifest=without)
    assert alone.reward_graph() == scoring / layout.REWARD_VARIANTS["q8"]["graph"]
    # Both say the same.
    prompts, responses = zip(*TEXTS, strict=True)
    found = [RewardModel(b, "fp32").raw(prompts, responses) for b in (bundle, alone)]
    assert 0 < np.abs(found[0] - found[1]).max() < 1e-4


TEXTS = [("Why?", "Rain."), ("How?", "word " * 90), ("Xin chào", "Trời mưa."), ("a", "<|im_end|>")]


@pytest.mark.parametrize(("variant", "bound"), [("fp32", 1e-3), (None, 0.6)])
def test_the_runtime_scores_as_torch_does(
    scoring: Path, reward_run: Path, trained: Any, variant: str | None, bound: float
) -> None:
    from cai_scale.training.models import load_tokenizer

    source = reward.find(reward_run, trained)
    tokenizer = load_tokenizer(source.model)
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}, {"role": "assistant", "content": r}],
            return_dict=True,
        )["input_ids"]
        for p, r in TEXTS
    ]
    expected = theirs(reward.load(source, ROWS[:1]).model, rows)
    model = RewardModel(open_bundle(scoring), variant)
    assert model.labels == PRINCIPLES
    prompts, responses = zip(*TEXTS, strict=True)
    raw = model.raw(prompts, responses)
    assert np.abs(raw - expected).max() < bound
    found = model.score(prompts, responses)
    assert [list(row) for row in found] == [list(PRINCIPLES)] * 4
    assert [list(row.values()) for row in found] == np.clip(raw, 0, 1).tolist()
    assert raw.min() < 0 or raw.max() > 1  # so that clipping shows
    # In order, whatever the order; the control: another text has another score.
    again = model.raw(prompts[::-1], responses[::-1])[::-1]
    assert np.abs(again - raw).max() < 1e-3
    assert np.abs(raw[0] - raw[2]).max() > 0.01


def test_a_response_that_is_too_long_is_refused(scoring: Path) -> None:
    model = RewardModel(open_bundle(scoring))
    with pytest.raises(DataError, match="the reward model reads 1 to 1024"):
        model.score(["q", "q"], ["short", "word " * 2000])
    assert model.score([], []) == []


def test_batches_hold_every_row_once_within_the_limit() -> None:
    lengths = [5, 300, 7, 7, 120, 9, 1, 64]
    found = list(batches(lengths, 64))
    assert sorted(index for batch in found for index in batch) == list(range(8))
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 64
    assert [len(batch) for batch in found] == [1, 1, 1, 5]  # 300, 120, 64, then 9 7 7 5 1
    assert list(batches([], 64)) == []


def test_a_bundle_without_a_reward_model_says_so(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest["scorer"] == "lexicon"
    assert "reward" not in opened.manifest
    assert "scores with the lexicon alone" in (bundle / layout.README).read_text()
    with pytest.raises(CaiError, match="has no reward model and scores with the lexicon"):
        RewardModel(opened)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward": []}, "no proper 'reward'"),
        ({"reward": {"variants": {}, "default": "q8"}}, "no proper 'labels'"),
        ({"reward": {"variants": {}, "default": "q8", "labels": []}}, "no variant 'q8'"),
        (
            {"reward": {"variants": {"q8": {"graph": "x"}}, "default": "q8", "labels": []}},
            'does not list "x"',
        ),
    ],
)
def test_a_manifest_whose_reward_model_does_not_fit_is_refused(
    scoring: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    copy = Path(shutil.copytree(scoring, tmp_path / "bundle"))
    manifest = read_json(copy / layout.MANIFEST)
    (copy / layout.MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(IntegrityError, match=said):
        open_bundle(copy)


def test_a_changed_reward_model_is_refused(scoring: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(scoring, tmp_path / "bundle"))
    graph = copy / layout.REWARD_VARIANTS["q8"]["fused"]
    graph.write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="differs from what was exported"):
        open_bundle(copy)
    manifest = read_json(copy / layout.MANIFEST)
    manifest["files"][layout.REWARD_VARIANTS["q8"]["fused"]] = sha256(graph)
    write_json(copy / layout.MANIFEST, manifest)
    with pytest.raises(IntegrityError, match="cannot be loaded"):
        RewardModel(open_bundle(copy))
