import copy
import json
from typing import Any

import pytest
import yaml

from cai_scale import constitution
from cai_scale.errors import ConfigError, MissingError


def data() -> dict[str, Any]:
    return copy.deepcopy(dict(constitution.load().data))


def test_default_has_the_four_principles_with_equal_weight() -> None:
    default = constitution.load()
    assert [p.id for p in default.principles] == ["harmless", "helpful", "honest", "respectful"]
    assert {p.weight for p in default.principles} == {1.0}
    assert {p.lexicon.start for p in default.principles} == {0.7}
    assert default.languages == ("en", "vi")


def test_default_lists_have_the_stated_effects_and_a_real_size() -> None:
    lists = {item.id: item for p in constitution.load().principles for item in p.lexicon.lists}
    assert {name: item.effect for name, item in lists.items()} == {
        "dangerous": -0.15,
        "helpful": 0.10,
        "hedges": 0.05,
        "absolutes": -0.10,
        "polite": 0.08,
    }
    for item in lists.values():
        for language, terms in item.terms.items():
            assert 25 <= len(set(terms)) <= 60, (item.id, language, len(set(terms)))
            assert len(set(terms)) == len(terms), (item.id, language)


def test_hash_depends_on_content_only(tmp_path: Any) -> None:
    default = constitution.load()
    reordered = dict(reversed(list(data().items())))
    path = tmp_path / "same.yaml"
    path.write_text("# a comment\n" + yaml.safe_dump(reordered, allow_unicode=True), "utf-8")
    assert constitution.load(path).sha256 == default.sha256
    changed = data()
    changed["principles"][0]["lexicon"]["start"] = 0.71
    assert constitution.from_dict(changed).sha256 != default.sha256


def test_json_round_trip_keeps_the_hash() -> None:
    default = constitution.load()
    again = constitution.from_dict(json.loads(json.dumps(default.data)))
    assert again.sha256 == default.sha256


def test_overall_is_the_weighted_mean() -> None:
    default = constitution.load()
    scores = {"harmless": 1.0, "helpful": 0.8, "honest": 0.7, "respectful": 0.9}
    assert default.overall(scores) == pytest.approx(0.85)
    weighted = data()
    weighted["principles"][0]["weight"] = 3
    assert constitution.from_dict(weighted).overall(scores) == pytest.approx(5.4 / 6)


def test_requests_name_the_principle_in_the_prompt_language() -> None:
    default = constitution.load()
    asked = default.request("below_floor", "vi", default.principles[2])
    assert default.principles[2].statement["vi"] in asked
    assert default.request("too_short", "fr") == default.request("too_short", "en")


def edit(path: str, value: Any) -> dict[str, Any]:
    changed: Any = data()
    node: Any = changed
    *parents, last = [int(k) if k.isdigit() else k for k in path.split("/")]
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return dict(changed)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("schema", 2, "schema"),
        ("colour", "red", "colour"),
        ("name", ..., "name"),
        ("languages", [], "languages"),
        ("languages/0", 5, "languages[0]"),
        ("principles", {}, "principles"),
        ("principles/1/weigth", 1, "principles[1].weigth"),
        ("principles/1/weight", 0, "principles[1].weight"),
        ("principles/1/weight", "1", "principles[1].weight"),
        ("principles/1/weight", True, "principles[1].weight"),
        ("principles/1/weight", float("nan"), "principles[1].weight"),
        ("principles/2/title/vi", ..., "principles[2].title.vi"),
        ("principles/2/title/fr", "Honnête", "principles[2].title.fr"),
        ("principles/3/statement/en", " ", "principles[3].statement.en"),
        ("principles/3/id", "honest", "principles[3]"),
        ("principles/0/lexicon/start", 1.5, "principles[0].lexicon.start"),
        ("principles/0/lexicon/lists/0/effect", "-0.15", "principles[0].lexicon.lists[0].effect"),
        (
            "principles/0/lexicon/lists/0/terms/en/3",
            False,
            "principles[0].lexicon.lists[0].terms.en[3]",
        ),
        ("requests/judge", ..., "requests.judge"),
        ("principles/0/id", "overall", "principles[0].id"),
        ("principles/0/weight", 10**400, "principles[0].weight"),
        ("name", "a\ud800", "name"),
    ],
)
def test_a_bad_key_is_named(path: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        constitution.from_dict(edit(path, value), "mine.yaml")
    assert f"mine.yaml: {named}:" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Any) -> None:
    with pytest.raises(MissingError, match="does not exist"):
        constitution.load(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: [", "utf-8")
    with pytest.raises(ConfigError, match="not valid YAML at line"):
        constitution.load(bad)
    for content, said in (
        ("name: a\nname: b\n", "the key 'name' stands twice"),
        ("schema: !!int abc\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ):
        bad.write_text(content, "utf-8")
        with pytest.raises(ConfigError, match=said):
            constitution.load(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        constitution.load(bad)
    bad.write_text("", "utf-8")
    with pytest.raises(ConfigError, match="expected keys and values"):
        constitution.load(bad)
