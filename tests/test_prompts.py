import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cai_scale import prompts
from cai_scale.errors import DataError, MissingError


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.casefold()))


def test_the_training_set_has_its_stated_make_up() -> None:
    train = prompts.load(prompts.TRAIN)
    languages = Counter(p.language for p in train)
    assert len(train) >= 300
    assert languages["en"] >= 200
    assert languages["vi"] >= 80
    assert Counter(p.category for p in train)["safety"] >= 40


def test_the_heldout_set_has_its_stated_make_up() -> None:
    heldout = prompts.load(prompts.HELDOUT)
    assert Counter(p.language for p in heldout) == {"en": 90, "vi": 30}
    english = Counter(p.category for p in heldout if p.language == "en")
    assert english["safe_looks_unsafe"] == 20
    assert english["unsafe"] == 15


def test_the_two_sets_are_disjoint() -> None:
    train = [words(p.text) for p in prompts.load(prompts.TRAIN)]
    for prompt in prompts.load(prompts.HELDOUT):
        mine = words(prompt.text)
        nearest = max(len(mine & other) / len(mine | other) for other in train)
        assert nearest < 0.5, prompt.text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "row 2: not JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n["y"]\n', "row 2: list, expected an object"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"text": "y"}\n', "row 3: no column `prompt`"),
        ("a.jsonl", b'{"prompt": ""}\n', "row 1, column `prompt`: ''"),
        ("a.jsonl", b'{"prompt": 5}\n', "row 1, column `prompt`: 5"),
        ("a.jsonl", b'{"prompt": "a\\u0000b"}\n', "row 1, column `prompt`: 'a\\x00b': holds a NUL"),
        ("a.jsonl", b'{"prompt": "a\\ud800"}\n', "lone surrogate at character 1"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "row 1: not UTF-8 at byte 12"),
        ("a.jsonl", b'{"prompt": NaN}\n', "row 1: not JSON"),
        ("a.jsonl", b'{"prompt": "' + b"x" * 300_000 + b'"}\n', "longer than 200000 characters"),
        ("a.jsonl", b'{"messages": []}\n', "row 1, column `messages`"),
        ("a.jsonl", b'{"messages": [{"role": "u", "content": "x"}]}\n', "expected a role among"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x"}]}\n',
            "the last message must be the user's",
        ),
        ("a.jsonl", b'{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}\n', "row 2, column `id`"),
        ("a.jsonl", b'{"prompt": "x", "language": 3}\n', "row 1, column `language`: 3"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"question\nx\n", "row 2: no column `prompt`"),
        ("a.csv", b"prompt\na,b\n", "row 2: more cells"),
        ("a.csv", b"prompt\n\xff\n", "not UTF-8"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.txt", b"x", "unknown kind; use .jsonl, .csv or .parquet"),
    ],
)
def test_a_malformed_file_names_row_and_column(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        prompts.load(str(path))
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_missing_file() -> None:
    with pytest.raises(MissingError, match=r"none\.jsonl does not exist"):
        prompts.load("none.jsonl")


def test_the_three_kinds_of_file_say_the_same(tmp_path: Path) -> None:
    import pandas

    rows = [{"prompt": 'Say "a, b"', "language": "en"}, {"prompt": "Chào bạn", "language": "vi"}]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    frame.to_json(tmp_path / "p.jsonl", orient="records", lines=True, force_ascii=False)

    def read(name: str) -> list[Any]:
        return [(p.messages, p.language) for p in prompts.load(str(tmp_path / name))]

    assert read("p.csv") == read("p.parquet") == read("p.jsonl")
    assert read("p.csv")[0] == (({"role": "user", "content": 'Say "a, b"'},), "en")


def test_messages_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(
        '{"messages": [{"role": "system", "content": "Be brief."},'
        '{"role": "user", "content": "Hi"}]}\n'
    )
    (prompt,) = prompts.load(str(path))
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    assert prompt.text == "Hi"


def test_ids_that_are_not_given_differ_for_equal_prompts(tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "x"}\n')
    first, second = prompts.load(str(path))
    assert first.id != second.id
