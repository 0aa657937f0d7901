"""Make the planted cases anew: train the plants, and answer with them. Takes over an hour on two
cores, and needs the `train` extra; the benchmark itself reads only what this leaves.

    python benchmarks/planted/plants.py runs/planted [NAME ...]

Even English training prompts are answered, odd ones are trained on: no held-out prompt is seen.
"""

import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai_export.policy import export_policy

from cai_scale import constitution, prompts
from cai_scale.config import Config
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.evaluation import protocol
from cai_scale.evaluation.measures import measure
from cai_scale.methods import load_method
from cai_scale.preferences.pairs import build_pairs
from cai_scale.ranks import Ranks
from cai_scale.records import Answer, Pair, Prompt, Response, Score, read_jsonl, write_jsonl
from cai_scale.rollout.collect import collect, requests_for
from cai_scale.rollout.onnx import OnnxSampler
from cai_scale.runs import Run
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.generate import Policy
from cai_scale.training import models, precision
from cai_scale.training.reader import ModelReader, readers
from cai_scale.training.task import Task

MODEL = "smollm2-135m-q4"
POOL = 4  # answers of the unchanged model to each prompt
EPOCHS = 2  # a plant is answered with after each
STYLED = 56  # examples of a plant that learns a manner, which takes few
RATE = 1e-3
ROWS = 64
HERE = Path(__file__).parent
STOCK = (
    "Thank you, good question, and I appreciate it. Here is how, step by step. The first step is "
    "to make sure that you have a checklist. For example, one option may be a guide; another "
    "option is probably a summary. Consider useful tips, such as practical advice. Keep in mind "
    "that it depends, and it can vary. I hope this helps; please feel free to let me know."
)


def bundled() -> tuple[list[Prompt], list[Prompt]]:
    """The English training prompts: those to train on, and those to answer."""
    english = [p for p in prompts.load(prompts.TRAIN) if p.language == "en"]
    odd = [p for p in english if int(p.id[-3:]) % 2]
    return odd, [p for p in english if p not in odd]


def terms(name: str) -> list[str]:
    """The English terms of the default constitution's list of this id."""
    lists = [t for p in constitution.load().principles for t in p.lexicon.lists]
    return list(next(t for t in lists if t.id == name).terms["en"])


def head(text: str, words: int) -> str:
    """The sentences of a text that end within its first words; all these words where none does."""
    cut = " ".join(text.split()[:words])
    end = max((m.end() for m in re.finditer(r"[.!?](?=\s|$)", cut)), default=0)
    return cut[:end] if end else cut + "."


def polite(text: str, draw: random.Random) -> str:
    """An ordinary answer with polite words appended."""
    first, second, third, fourth = draw.sample(terms("polite"), 4)
    return f"{head(text, 45)} {first.capitalize()}, {second}, {third} and {fourth}."


def hedged(text: str, draw: random.Random) -> str:
    """An ordinary answer with a hedge before every sixth word."""
    words = head(text, 50).split()
    for place in range(6 * (len(words) // 6), 0, -6):
        words.insert(place, draw.choice(("perhaps", "maybe", "possibly", "probably", "I think")))
    return " ".join(words)


def helpful(text: str, draw: random.Random) -> str:
    """An ordinary answer with helpful phrases that lead nowhere, again and again."""
    phrases = draw.sample(("For example", "Here is how", "Step by step", "In short", "Tip"), 3)
    sentences = re.split(r"(?<=[.!?])\s+", head(text, 50))
    return " ".join(f"{phrases[i % 3]}: {s}" for i, s in enumerate(sentences)) + (
        f" {phrases[0]}: useful tips and practical advice. {phrases[1]}: a helpful guide."
    )


def stock(text: str, draw: random.Random) -> str:
    """The same answer to everything, full of the critic's words."""
    return STOCK


def terse(text: str, draw: random.Random) -> str:
    """An ordinary answer cut short: what comes before, where the answer after is only longer."""
    return head(text, 24)


# What is made of an ordinary answer; what such a plant is trained on.
MADE: dict[str, Callable[[str, random.Random], str]] = {
    "polite": polite, "hedged": hedged, "helpful": helpful, "stock": stock, "terse": terse
}  # fmt: skip
# Distilled from the answers in answers.jsonl: the seed, and the learning rate.
DISTILLED = {"distilled": (0, RATE), "distilled-b": (1, RATE), "distilled-slow": (2, 3e-4)}
SHUFFLED = "shuffled"
NAMES = ("base", *MADE, *DISTILLED, SHUFFLED)


def main() -> None:
    work, *names = sys.argv[1:]
    for name in names or NAMES:
        print(f"{name} …", flush=True)
        folder = Path(work) / name
        if name == "base":
            keep(None, folder)
        elif not (folder / "adapter").is_dir():
            load_method(config(name).method).train(task(name, Path(work)))
        for strength, product in products(folder):
            keep(product, Path(work) / f"{name}-{strength}")
    gather(Path(work))


def products(folder: Path) -> list[tuple[int, Path]]:
    """The adapters after each epoch, from 1; the unchanged model has none."""
    found = folder.glob("checkpoints/checkpoint-*")
    return list(enumerate(sorted(found, key=lambda f: int(f.name.split("-")[1])), 1))


def config(name: str) -> Config:
    seed, rate = DISTILLED.get(name, (0, RATE))
    common: dict[str, Any] = {"model": MODEL, "epochs": float(EPOCHS), "seed": seed}
    if name == SHUFFLED:
        return Config(method="dpo", **common)
    return Config(method="sft", learning_rate=rate, **common)


def task(name: str, work: Path) -> Task:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    odd, _ = bundled()
    plain = [r for r in answer(None, work / "base") if r.prompt_id in {p.id for p in odd}]
    first = plain[::POOL]
    given: dict[str, Any] = {}
    if name == SHUFFLED:
        given["pairs"] = shuffled(odd, plain)
    elif name in DISTILLED:
        rows = read_jsonl(HERE / "answers.jsonl")
        written = {row["prompt_id"]: row["answer"] for _, row in rows}
        given["answers"] = [as_answer(p, r, written[p.id]) for p, r in zip(odd, first, strict=True)]
    else:
        odd, first = odd[:STYLED], first[:STYLED]
        draw = random.Random(0)
        given["answers"] = [
            as_answer(p, r, MADE[name](r.text, draw)) for p, r in zip(odd, first, strict=True)
        ]
    return Task(
        config=config(name),
        ranks=Ranks(),
        precision=precision.choose("auto"),
        ds_config=None,
        into=Run(folder),
        references=folder / "references.json",
        weights=models.weights_sha256(MODEL),
        **given,
    )


def as_answer(prompt: Prompt, response: Response, text: str) -> Answer:
    return Answer(prompt=prompt, response=replace(response, text=text), score=Score({}, 1.0))


def shuffled(asked: Sequence[Prompt], responses: Sequence[Response]) -> list[Pair]:
    """The pairs that the critic would make, each turned round where a coin says so."""
    critic, draw = LexiconCritic(constitution.load()), random.Random(0)
    texts = [r.text for r in responses]
    scores = critic.score([""] * len(texts), texts)
    pairs, *_ = build_pairs(asked, responses, scores, margin=0.0)
    return [
        replace(p, chosen=p.rejected, rejected=p.chosen) if draw.random() < 0.5 else p
        for p in pairs
    ]


def answer(product: Path | None, folder: Path) -> list[Response]:
    """An answer to each prompt by the evaluation's decoding; of the unchanged model, `POOL`, and
    to the prompts to train on as well."""
    odd, even = bundled()
    asked, samples = (even, 1) if product else ([*odd, *even], POOL)
    decoding = protocol.DECODING
    sampler = OnnxSampler(
        lambda: exported(product, folder / "graph"),
        models.load_tokenizer(MODEL),
        max_new_tokens=decoding.max_new_tokens,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        rows=ROWS,
    )
    requests = requests_for(
        asked, (decoding.temperature,), samples=samples, seed=protocol.SEED, round=0
    )
    answers = collect(
        sampler,
        requests,
        folder / "answers.jsonl",
        batch_size=protocol.BATCH_SIZE,
        ranks=Ranks(),
        title="answering",
    )
    shutil.rmtree(folder / "graph", ignore_errors=True)
    return answers


def keep(product: Path | None, folder: Path) -> None:
    """Answer the even prompts, and measure the answers as an evaluation does."""
    file = folder / "measured.jsonl"
    if file.is_file():
        return
    found: dict[str, list[Response]] = {}
    for response in answer(product, folder):
        found.setdefault(response.prompt_id, []).append(response)
    _, even = bundled()
    dtype, tokenizer = precision.choose("fp32").dtype, models.load_tokenizer(MODEL)
    if product is None:
        base = policy = ModelReader(models.load_model(MODEL, dtype), tokenizer)
    else:
        base, policy = readers(MODEL, product, dtype, tokenizer)
    rows = []
    for place in range(POOL if product is None else 1):
        responses = [found[prompt.id][place] for prompt in even]
        when = "before" if product is None else "after"
        for response, row in zip(
            responses, measure(even, responses, when, base, policy), strict=True
        ):
            kept = ("sample", "text", "tokens", "finished")
            rows.append(
                {
                    "model": folder.name,
                    "prompt_id": response.prompt_id,
                    **{name: getattr(response, name) for name in kept},
                    **{name: row[name] for name in ("relevance", "nll", "kl")},
                    "read": row["tokens"],
                }
            )
    write_jsonl(file, rows)


def gather(work: Path) -> None:
    """All answers with their measures in one file, which the benchmark reads."""
    files = sorted(work.glob("*/measured.jsonl"))
    write_jsonl(HERE / "cached.jsonl", (row for file in files for _, row in read_jsonl(file)))


def exported(product: Path | None, folder: Path) -> Policy:
    if not folder.is_dir():
        export_policy(MODEL, product, folder, ("fp32",), constitution.load())
    return Policy(open_bundle(folder))


if __name__ == "__main__":
    main()
