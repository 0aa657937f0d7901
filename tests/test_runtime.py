"""The runtime against torch and transformers: the same text from the same numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cai_scale.errors import ConfigError, DataError, IntegrityError
from cai_scale.records import sha256
from cai_scale.rollout.sampler import Request, TransformersSampler
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.chat import Chat
from cai_scale.runtime.generate import Policy
from cai_scale.runtime.sampling import Decoding
from processes import run_python

TEXTS = ["Why?", "How do I keep bread fresh for a week?", "Vì sao trời mưa?", "Tell me about rain."]


def conversation(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


@pytest.fixture(scope="module")
def policy(bundle: Path) -> Policy:
    return Policy(open_bundle(bundle), "fp32")


@pytest.fixture(scope="module")
def torch_sampler(finished_run: Any) -> TransformersSampler:
    import torch

    from cai_scale.training.models import load_model, load_tokenizer, with_adapter

    name = finished_run.settings()["model"]
    return TransformersSampler(
        lambda: with_adapter(load_model(name, torch.float32), finished_run.adapter),
        load_tokenizer(name),
        max_new_tokens=24,
        top_p=0.95,
        top_k=50,
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_the_bundle_answers_as_torch_does(
    policy: Policy, torch_sampler: TransformersSampler, temperature: float
) -> None:
    """Merged, exported, run by onnxruntime and numpy, left-padded in a batch: the same answers
    as the adapter's under transformers, token for token, since the random numbers are shared."""
    decoding = Decoding(temperature=temperature, top_p=0.95, top_k=50, max_new_tokens=24)
    requests = [
        Request(messages=conversation(t), prompt_id=t, seed=5, temperature=temperature)
        for t in TEXTS
    ]
    answered = {r.prompt_id: c for r, c in torch_sampler.sample([requests])}
    expected = [answered[text] for text in TEXTS]
    found = policy.answer([conversation(t) for t in TEXTS], decoding, seed=5)
    assert [(a.text, a.tokens, a.finished) for a in found] == [
        (c.text, c.tokens, c.finished) for c in expected
    ]
    # The control: another seed answers otherwise, unless nothing is drawn.
    other = policy.answer([conversation(t) for t in TEXTS], decoding, seed=6)
    assert (other == found) is (temperature == 0)


def test_an_answer_does_not_depend_on_its_batch(bundle: Path) -> None:
    policy = Policy(open_bundle(bundle))
    together = policy.answer([conversation(t) for t in TEXTS])
    assert together == [policy.answer([conversation(t)])[0] for t in TEXTS]


def test_tokens_of_a_conversation_are_those_of_transformers(
    bundle: Path, finished_run: Any
) -> None:
    from cai_scale.training.models import load_tokenizer

    tokenizer = load_tokenizer(finished_run.settings()["model"])
    chat = Chat(open_bundle(bundle))
    for messages in (
        conversation("Xin chào! {% raw %} <|im_end|>"),
        (
            {"role": "system", "content": "Be  brief.\n"},
            *conversation("Hi"),
            {"role": "assistant", "content": "Hello"},
            *conversation("Why?"),
        ),
    ):
        expected = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert chat.encode(messages) == list(expected)


def test_transformers_reads_the_bundle_as_a_tokenizer(bundle: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    text = tokenizer.apply_chat_template(list(conversation("Hi")), tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_prompt_that_leaves_no_room_is_refused(policy: Policy) -> None:
    with pytest.raises(DataError, match="exceed the model's 1024"):
        policy.answer([conversation("word " * 2000)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{% for %}"),
        ("generation_config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("onnx/model_quantized.onnx", "nothing"),
    ],
)
def test_a_bundle_that_cannot_be_loaded_is_refused(
    bundle: Path, tmp_path: Path, name: str, content: str
) -> None:
    """Changed together with its manifest, so that the hashes agree."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copy / name).write_text(content)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = sha256(copy / name)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="cannot be loaded"):
        Policy(open_bundle(copy))


def test_an_unknown_variant_lists_those_that_exist(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="'q4'; choose one of: fp32, q8"):
        open_bundle(bundle).graph("q4")


def test_scores_of_the_command_are_those_of_the_critic(
    bundle: Path, tiny_constitution: Path
) -> None:
    from cai_scale import constitution
    from cai_scale.critics.lexicon import LexiconCritic

    loaded = constitution.load(tiny_constitution)
    texts = ["a c n and e o", "x x x", ""]
    rows = "".join(json.dumps({"prompt": "q", "response": text}) + "\n" for text in texts)
    result = run_python(
        "-m", "cai_scale.runtime.cli", "--bundle", str(bundle), "--input", "-", stdin=rows
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    expected = LexiconCritic(loaded).score(["q"] * 3, texts)
    assert [f["overall"] for f in found] == [e.overall if e else None for e in expected]
    assert found[1]["principles"]["harmless"] == pytest.approx(0.25)
    assert found[2]["principles"] is None
    assert {f["constitution"] for f in found} == {loaded.sha256}


def test_every_command_takes_the_pin_of_a_bundle(bundle: Path) -> None:
    digest = sha256(bundle / "manifest.json")
    for module, flags in (
        ("cai_scale.runtime.cli", ("--response", "x")),
        ("cai_scale.cli", ("generate", "--prompt", "Why?", "--max_new_tokens", "2")),
    ):
        for pin, code in ((digest, 0), ("0" * 64, 2)):
            result = run_python(
                "-m", module, *flags, "--bundle", str(bundle), "--expect-sha256", pin
            )
            assert result.returncode == code, result.stderr
            assert (pin in result.stderr and digest in result.stderr) is (code == 2)


def test_generate_prints_an_answer_for_each_prompt(bundle: Path) -> None:
    command = ("-m", "cai_scale.cli", "generate", "--bundle", str(bundle), "--max_new_tokens", "8")
    first = run_python(*command, "--prompt", "Why?", "--prompt", "Who are you?")
    assert (first.returncode, first.stderr) == (0, "")
    again = run_python(*command, "--prompt", "Who are you?")
    assert first.stdout.endswith(again.stdout)
    other = run_python(*command, "--prompt", "Who are you?", "--seed", "1")
    assert other.stdout != again.stdout
