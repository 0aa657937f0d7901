"""An answer's text while its tokens arrive."""

import pytest
from tokenizers import Tokenizer, decoders, models

from cai_scale.runtime.text import GrowingText, token_text
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer().backend_tokenizer


def pieces(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[list[str], GrowingText]:
    growing = GrowingText(tokenizer, stop)
    found = []
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        found.append(growing.feed(token))
        if growing.stopped:
            break
    return found, growing


@pytest.mark.parametrize("text", ["Rain falls.", "Vì sao trời mưa? 🌧️ Đúng vậy.", "a  b\n\nc"])
def test_pieces_make_the_text_and_never_half_a_letter(tokenizer: Tokenizer, text: str) -> None:
    found, growing = pieces(tokenizer, text)
    assert "�" not in "".join(found)
    assert "".join(found) + growing.finish(text) == text
    assert growing.text == text


def test_white_space_is_held_back_until_something_follows(tokenizer: Tokenizer) -> None:
    found, growing = pieces(tokenizer, " one two \n ")
    assert "".join(found) == "one two"
    assert growing.finish("one two") == ""


def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    found, growing = pieces(tokenizer, "one two STOP three", "STOP", "three")
    assert growing.stopped
    assert "".join(found) == "one two"
    # The control: without it the text goes on.
    found, growing = pieces(tokenizer, "one two STOP three", "STOQ")
    assert not growing.stopped
    assert "".join(found) == "one two STOP three"


def test_the_beginning_of_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    found, growing = pieces(tokenizer, "one STO", "STOP")
    assert "".join(found) == "one"
    assert growing.finish("one STO") == " STO"


def test_a_token_keeps_its_space_and_a_part_of_a_letter_is_none(tokenizer: Tokenizer) -> None:
    text = "Rain in  the\n mountains."
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(token_text(tokenizer, token) for token in tokens) == text
    assert any(token_text(tokenizer, token).startswith(" ") for token in tokens)
    parts = tokenizer.encode("🌧", add_special_tokens=False).ids
    assert len(parts) > 1 and all("\ufffd" in token_text(tokenizer, part) for part in parts)
    assert token_text(tokenizer, tokenizer.token_to_id("<|im_end|>")) == "<|im_end|>"


def test_a_token_keeps_its_space_where_a_text_loses_its_first() -> None:
    """As Llama 2 and Mistral decode."""
    words = ["▁A", "A", "▁", "▁▁", "<0x0A>", "<0xC3>"]
    llama = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    llama.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    found = [token_text(llama, token) for token in range(len(words))]
    assert found == [" A", "A", " ", "  ", "\n", "\ufffd"]
    assert llama.decode([0]) == "A"  # the control: by itself it has lost the space
