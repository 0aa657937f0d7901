"""Chat templates of real families, as trl ships them: rendered as transformers renders them."""

from importlib import resources
from typing import Any

import pytest
from jinja2 import TemplateError

from cai_scale.runtime.template import compile_template

FAMILIES = (
    *("llama3", "llama3_2", "qwen2_5", "qwen3", "qwen3_training", "gemma", "gemma3", "phi3"),
    *("deepseekv3", "cohere", "glm4moe", "gptoss", "nemotron_3_nano", "lfm2"),
)
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tại sao? <b>&'\"\n"}],
    [
        {"role": "user", "content": " Xin chào "},
        {"role": "assistant", "content": "Chào bạn.\n\n"},
        {"role": "user", "content": "{{ messages }} {% raw %}"},
    ],
    [{"role": "assistant", "content": "I begin."}, {"role": "assistant", "content": "Again."}],
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}


def source(family: str) -> str:
    return (resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text("utf-8")


def ours(template: str, messages: list[dict[str, str]], *, answer: bool) -> Any:
    try:
        return compile_template(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=answer, **SPECIAL
        )
    except TemplateError:
        return TemplateError


def theirs(template: str, messages: list[dict[str, str]], *, answer: bool) -> Any:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=answer, **SPECIAL
        )
    except TemplateError:
        return TemplateError
    return rendered[0][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_rendered_as_transformers_renders_it(family: str) -> None:
    template = source(family)
    rendered = [
        (ours(template, messages, answer=answer), theirs(template, messages, answer=answer))
        for messages in CONVERSATIONS
        for answer in (True, False)
    ]
    assert [our for our, _ in rendered] == [their for _, their in rendered]
    assert any(isinstance(our, str) and "sky blue" in our for our, _ in rendered)


def test_families_differ() -> None:
    """The control: another family's template gives another text."""
    texts = {ours(source(family), CONVERSATIONS[0], answer=True) for family in FAMILIES}
    assert len(texts) >= 10


def test_blocks_are_trimmed_and_json_is_readable() -> None:
    template = (
        "{% for m in messages %}\n  {% generation %}\n"
        "{{ m | tojson }}{% endgeneration %}\n{% endfor %}"
    )
    messages = [{"content": "à <b>"}]
    assert ours(template, messages, answer=True) == theirs(template, messages, answer=True)
    assert ours(template, messages, answer=True) == '{"content": "à <b>"}'


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace(__class__=1) %}{{ n }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    text = ours(attack, [{"role": "user", "content": "x"}], answer=True)
    assert text is TemplateError or text == ""
