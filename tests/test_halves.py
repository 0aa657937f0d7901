"""The lexicon in two halves: to train on one, and to see what the other gains."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from answers import answered, rules
from cai_scale import constitution
from cai_scale.constitution import Constitution
from cai_scale.critics import HALF, check, identity, load_critic
from cai_scale.critics.fold import tokenise
from cai_scale.critics.halves import halves, has_terms
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import ConfigError
from cai_scale.evaluation.halves import halves_gain
from cai_scale.records import read_json, read_jsonl
from cai_scale.runs import Run
from cai_scale.verify import verify_run
from processes import run_python
from test_torch_free import BLOCK
from test_verify import broken, forge, rewrite

DEFAULT = constitution.load()


def terms(of: Constitution) -> set[tuple[str, str, str, str]]:
    return {
        (principle.id, item.id, language, term)
        for principle in of.principles
        for item in principle.lexicon.lists
        for language, listed in item.terms.items()
        for term in listed
    }


def score(of: Constitution, text: str) -> float:
    [found] = LexiconCritic(of).score([""], [text])
    assert found is not None
    return found.overall


def test_the_halves_of_the_default_are_these() -> None:
    """On every machine and in every version: a stored run is checked by them."""
    assert [half.sha256 for half in halves(DEFAULT)] == [
        "fe82e2cc999979c18f622189b4b39ced3bfd7c6cb782b6d279ac23b88dff3913",
        "3e72b0bff69b47a4a49267d607106584c031831c3d032b741c34821389ae8475",
    ]


@pytest.mark.parametrize("seed", range(5))
def test_both_are_constitutions_that_share_the_terms(seed: int) -> None:
    first, second = halves(DEFAULT, seed)
    assert terms(first) | terms(second) == terms(DEFAULT)
    assert terms(first) & terms(second) == set()
    for half in (first, second):
        assert constitution.from_dict(copy.deepcopy(dict(half.data))) == half
        for whole, part in zip(DEFAULT.principles, half.principles, strict=True):
            assert (part.id, part.weight) == (whole.id, whole.weight)
            for item, short in zip(whole.lexicon.lists, part.lexicon.lists, strict=True):
                assert (short.id, short.effect) == (item.id, item.effect)
                for language, listed in item.terms.items():
                    assert len(listed) // 2 <= len(short.terms[language]) <= len(listed) // 2 + 1


def test_another_seed_shares_them_otherwise() -> None:
    assert len({halves(DEFAULT, seed)[0].sha256 for seed in range(5)}) == 5
    assert halves(DEFAULT, 3) == halves(DEFAULT, 3)


@pytest.mark.parametrize("seed", range(5))
def test_no_term_stands_inside_one_of_the_other_half(seed: int) -> None:
    first, second = ([tokenise(row[3]) for row in terms(half)] for half in halves(DEFAULT, seed))

    def inside(part: list[str], whole: list[str]) -> bool:
        return any(whole[i : i + len(part)] == part for i in range(len(whole)))

    assert [(a, b) for a in first for b in second if inside(a, b) or inside(b, a)] == []
    assert any(inside(a, b) for a in first for b in first if a != b)  # the control


def test_what_the_halves_find_is_what_the_whole_finds() -> None:
    text = (
        "I appreciate it, thank you. It is not always poison, perhaps; cảm ơn bạn, "
        "bạn có thể thử, luôn luôn giết người, heroin and a useful tip."
    )
    first, second = (LexiconCritic(half).occurrences(text) for half in halves(DEFAULT))
    assert first + second == LexiconCritic(DEFAULT).occurrences(text)
    assert min(first.total(), second.total()) > 0


def test_spellings_of_a_term_stay_together() -> None:
    lists = {"a": (0.1, ["hòa bình", "hoà bình", "Tip", "tip"]), "b": (0.1, ["x", "y"])}
    for seed in range(8):
        first, second = halves(rules({"p": (1, 0.5, lists)}), seed)
        for pair in ({"hòa bình", "hoà bình"}, {"Tip", "tip"}):
            assert [len(pair & {row[3] for row in terms(h)}) for h in (first, second)] in (
                [2, 0],
                [0, 2],
            )


def test_a_list_of_one_term_is_in_the_first_half() -> None:
    whole = rules({"p": (1, 0.5, {"one": (0.1, ["only"]), "two": (0.2, ["left", "right"])})})
    first, second = halves(whole)
    assert [item.id for item in first.principles[0].lexicon.lists] == ["one", "two"]
    assert [item.id for item in second.principles[0].lexicon.lists] == ["two"]
    assert has_terms(second)
    assert not has_terms(halves(rules({"p": (1, 0.5, {"one": (0.1, ["only"])})}))[1])


def split() -> tuple[Constitution, str, str]:
    """Two terms, and which of them is in the first half."""
    whole = rules({"p": (1, 0.5, {"good": (0.1, ["left", "right"])})})
    [(*_, seen)], [(*_, unseen)] = map(terms, halves(whole))
    return whole, seen, unseen


def test_the_gain_of_either_half_by_hand() -> None:
    whole, seen, unseen = split()
    rows = [
        answered("no", f"{seen} {seen} {unseen}", whole),  # +0.2 and +0.1
        answered(unseen, f"{seen}", whole),  # +0.1 and -0.1
        answered("no", "", whole),  # left out
    ]
    found = halves_gain(rows, whole, HALF)
    assert found["trained_on"] == "half"
    assert found["seen"] == {
        "n": 2,
        "before": 0.5,
        "after": 0.65,
        "delta": 0.15,
        "ci95": pytest.approx([0.1, 0.2]),
    }
    assert (found["unseen"]["delta"], found["unseen"]["ci95"]) == (0.0, pytest.approx([-0.1, 0.1]))


@pytest.mark.parametrize(
    ("trained", "on"),
    [
        ("lexicon", "all"),
        ("lexicon:half", "half"),
        ("lexicon:half*0.5+judge*0.5", "half"),
        ("lexicon:half+lexicon", "all"),
        ("judge", "all"),
    ],
)
def test_what_was_trained_on(trained: str, on: str) -> None:
    assert halves_gain([], split()[0], trained)["trained_on"] == on


def test_a_half_without_terms_gains_nothing_that_can_be_told() -> None:
    whole = rules({"p": (1, 0.5, {"one": (0.1, ["only"])})})
    found = halves_gain([answered("no", "only", whole)], whole, "lexicon")
    assert (found["seen"]["delta"], found["unseen"]["delta"]) == (pytest.approx(0.1), None)


def test_the_critic_counts_the_first_half() -> None:
    whole, seen, unseen = split()
    critic = load_critic(HALF, whole)
    assert critic.name == "lexicon:half"
    found = critic.score(["", ""], [f"{seen} {unseen}", ""])
    assert [s and s.overall for s in found] == [pytest.approx(0.6), None]
    assert score(whole, f"{seen} {unseen}") == pytest.approx(0.7)
    assert LexiconCritic(whole).name == "lexicon"


def test_the_critic_beside_others() -> None:
    whole, seen, unseen = split()
    both = load_critic("lexicon:half*0.5+lexicon*0.5", whole)
    [found] = both.score([""], [f"{seen} {unseen}"])
    assert found is not None
    assert found.overall == pytest.approx(0.65)
    assert found.votes == pytest.approx({"lexicon:half": 0.6, "lexicon": 0.7})
    assert identity("lexicon:half+lexicon") == {}


def test_a_lexicon_that_cannot_be_split_is_refused_before_anything_starts() -> None:
    whole = rules({"p": (1, 0.5, {"one": (0.1, ["only"])})})
    with pytest.raises(ConfigError, match=r"lexicon:half.*few words has no list of two terms"):
        check(HALF, whole)
    check("lexicon", whole)
    check(HALF, DEFAULT)


@pytest.fixture(scope="module")
def half_run(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("runs") / "half"
    flags = ("--critic", HALF, "--output", str(path))
    result = run_python("-m", "cai_scale.launch.train", *job, *flags)
    assert result.returncode == 0, result.stderr
    return Run(path)


def test_a_run_trains_on_half_and_is_judged_by_the_whole(half_run: Run) -> None:
    summary = read_json(half_run.summary)
    assert (summary["trained_on"], summary["critic"]) == ("lexicon:half", "lexicon")
    whole = constitution.from_dict(read_json(half_run.constitution))
    files = half_run.round(1)
    texts = {
        (row["prompt_id"], row["sample"]): row["text"] for _, row in read_jsonl(files.rollouts)
    }
    stored = [row for _, row in read_jsonl(files.scores(files.rollouts)) if row["score"]]
    first, _ = halves(whole)
    given = [row["score"]["overall"] for row in stored]
    read = [texts[row["prompt_id"], row["sample"]] for row in stored]
    assert given == pytest.approx([score(first, text) for text in read])
    assert given != pytest.approx([score(whole, text) for text in read])  # the control


def test_the_run_is_verified_without_torch(half_run: Run) -> None:
    code = BLOCK + "from cai_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    found = run_python("-c", code, "verify", str(half_run.path))
    assert (found.returncode, found.stderr) == (0, "")
    said = {link.name: link.said for link in verify_run(half_run)}
    assert "scored again" in said["revise"]


def test_a_score_by_the_other_half_is_found_out(half_run: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(half_run.path, tmp_path / "run")))
    files = run.round(1)

    def other(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            if row["score"]:
                row["score"]["overall"] = round(row["score"]["overall"] - 0.1, 9)
        return rows

    rewrite(files.scores(files.rollouts), other)
    forge(run)
    assert "revise" in broken(verify_run(run))
