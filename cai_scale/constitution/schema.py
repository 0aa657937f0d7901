"""The schema of a constitution: what a file may say, checked key by key on load."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cai_scale.errors import ConfigError, MissingError

SCHEMA = 1
LARGEST = 1_000_000
REQUESTS = ("critique", "too_short", "repetitive", "below_floor", "judge")
PLACEHOLDER = "{principle}"


@dataclass(frozen=True, kw_only=True)
class TermList:
    """Terms that move a principle's score by `effect` for every occurrence."""

    id: str
    effect: float
    terms: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """Where a principle's score starts, in [0, 1], and the lists that move it."""

    start: float
    lists: tuple[TermList, ...]


@dataclass(frozen=True, kw_only=True)
class Principle:
    """One principle: `title` and `statement` per language, and its share of the overall score."""

    id: str
    weight: float
    title: Mapping[str, str]
    statement: Mapping[str, str]
    lexicon: Lexicon


@dataclass(frozen=True, kw_only=True)
class Constitution:
    """A validated constitution. `data` is the file's content, which `sha256` identifies."""

    name: str
    languages: tuple[str, ...]
    principles: tuple[Principle, ...]
    requests: Mapping[str, Mapping[str, str]]
    data: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of the content as canonical JSON: comments and layout do not change it."""
        canonical = json.dumps(
            self.data, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()

    def overall(self, scores: Mapping[str, float]) -> float:
        """The mean of the principles' scores, weighted by `weight`; each in [0, 1]."""
        total = sum(p.weight for p in self.principles)
        return sum(p.weight * scores[p.id] for p in self.principles) / total

    def request(self, kind: str, language: str, principle: Principle | None = None) -> str:
        """What to ask a model, in `language` or, where that is missing, in the first language."""
        wording = self.requests[kind]
        text = wording.get(language, wording[self.languages[0]])
        if principle is None:
            return text
        statement = principle.statement.get(language, principle.statement[self.languages[0]])
        return text.replace(PLACEHOLDER, statement)


def load(path: str | Path | None = None) -> Constitution:
    """Read and check a YAML (or JSON) file; the bundled default where `path` is None.

    Raises:
        MissingError: there is no such file.
        ConfigError: the file breaks the schema; the message names the offending key.
    """
    if path is None:
        text = resources.files("cai_scale.constitution").joinpath("default.yaml").read_text("utf-8")
        return from_dict(yaml.safe_load(text), "default.yaml")
    path = Path(path)
    try:
        content = path.read_text("utf-8")
    except FileNotFoundError:
        raise MissingError(f"constitution {path} does not exist; name a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"constitution {path} cannot be read as UTF-8 text ({error}); name a YAML file"
        ) from None
    try:
        data = yaml.load(content, _Loader)
    except (ValueError, RecursionError) as error:  # a tag such as !!int on a word; deep nesting
        raise ConfigError(f"constitution {path} is not valid YAML ({error}); mend it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(
            f"constitution {path} is not valid YAML{where}: {problem}; mend that line"
        ) from None
    return from_dict(data, str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return dict(super().construct_mapping(node, deep=deep))


def from_dict(data: object, source: str = "constitution") -> Constitution:
    """Check `data` against the schema and build a `Constitution`.

    Raises:
        ConfigError: naming `source`, the key as a path such as `principles[0].weight`, its
            value, and what is expected there.
    """
    root = _Node(data, "", source)
    root.keys("schema", "name", "languages", "principles", "requests")
    schema = root.at("schema")
    if schema.value != SCHEMA:
        schema.fail(f"expected {SCHEMA}")
    languages = tuple(node.text() for node in root.at("languages").items())
    principles = tuple(_principle(node, languages) for node in root.at("principles").items())
    _unique(root.at("principles"), [p.id for p in principles])
    requests = root.at("requests")
    requests.keys(*REQUESTS)
    return Constitution(
        name=root.at("name").text(),
        languages=languages,
        principles=principles,
        requests={kind: _wording(requests.at(kind), languages) for kind in REQUESTS},
        data=root.mapping(),
    )


def _principle(node: "_Node", languages: tuple[str, ...]) -> Principle:
    node.keys("id", "weight", "title", "statement", "lexicon")
    lexicon = node.at("lexicon")
    lexicon.keys("start", "lists")
    lists = tuple(_term_list(item, languages) for item in lexicon.at("lists").items())
    _unique(lexicon.at("lists"), [item.id for item in lists])
    if node.at("id").value == "overall":
        node.at("id").fail("that is the name of the mean; choose another")
    weight = node.at("weight").number()
    if weight <= 0:
        node.at("weight").fail("expected a number above 0")
    start = lexicon.at("start").number()
    if not 0 <= start <= 1:
        lexicon.at("start").fail("expected a number from 0 to 1")
    return Principle(
        id=node.at("id").text(),
        weight=weight,
        title=_wording(node.at("title"), languages),
        statement=_wording(node.at("statement"), languages),
        lexicon=Lexicon(start=start, lists=lists),
    )


def _term_list(node: "_Node", languages: tuple[str, ...]) -> TermList:
    node.keys("id", "effect", "terms")
    terms = node.at("terms")
    terms.keys(*languages)
    return TermList(
        id=node.at("id").text(),
        effect=node.at("effect").number(),
        terms={
            language: tuple(term.text() for term in terms.at(language).items())
            for language in languages
        },
    )


def _wording(node: "_Node", languages: tuple[str, ...]) -> dict[str, str]:
    node.keys(*languages)
    return {language: node.at(language).text() for language in languages}


def _unique(node: "_Node", ids: list[str]) -> None:
    for index, name in enumerate(ids):
        if name in ids[:index]:
            node.item(index).fail(f"the id {name!r} is taken already; ids must differ")


class _Node:
    """A value with its path, so that every complaint can name the key it is about."""

    def __init__(self, value: object, path: str, source: str) -> None:
        self.value, self.path, self.source = value, path, source

    def fail(self, expected: str) -> None:
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ConfigError(f"{self.source}: {self.path or 'the file'}: {shown}: {expected}")

    def mapping(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.fail("expected keys and values")
        return dict(self.value)  # type: ignore[call-overload]

    def keys(self, *expected: str) -> None:
        """Exactly these keys, no other."""
        present = self.mapping()
        for key in present:
            if key not in expected:
                _Node(present[key], self._join(str(key)), self.source).fail(
                    f"unknown key {str(key)!r}; known here: {', '.join(expected)}"
                )
        for key in expected:
            if key not in present:
                raise ConfigError(
                    f"{self.source}: {self._join(key)}: the key is missing; add {key!r}"
                )

    def at(self, key: str) -> "_Node":
        return _Node(self.mapping()[key], self._join(key), self.source)

    def item(self, index: int) -> "_Node":
        return _Node(self.value[index], f"{self.path}[{index}]", self.source)  # type: ignore[index]

    def items(self) -> Iterator["_Node"]:
        if not isinstance(self.value, list) or not self.value:
            self.fail("expected a list with at least one entry")
        for index in range(len(self.value)):  # type: ignore[arg-type]
            yield self.item(index)

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value.strip():
            self.fail("expected a text that is not empty (quote words such as no, yes, on)")
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.value)):
            self.fail("expected text without lone surrogates")
        return str(self.value)

    def number(self) -> float:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail("expected a number")
        if not abs(value) <= LARGEST:  # type: ignore[arg-type]  # so that a NaN fails
            self.fail(f"expected a finite number, at most {LARGEST:,}")
        return float(value)  # type: ignore[arg-type]

    def _join(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key
