"""Collect answers over all ranks into one file, continuing where an earlier start stopped."""

import contextlib
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from cai_scale.errors import DataError
from cai_scale.ranks import Ranks, wait_for
from cai_scale.records import Prompt, Response, canonical, read_jsonl, read_records, write_jsonl
from cai_scale.rollout.sampler import Request, Sampler, cut
from cai_scale.terminal import progress_bar

Key = tuple[str, int]


def requests_for(
    prompts: Iterable[Prompt],
    temperatures: Sequence[float],
    *,
    samples: int,
    seed: int,
    round: int,
) -> list[Request]:
    """`samples` requests per prompt; the temperatures take turns over the samples."""
    return [
        Request(
            messages=prompt.messages,
            prompt_id=prompt.id,
            sample=sample,
            round=round,
            seed=seed,
            temperature=temperatures[sample % len(temperatures)],
        )
        for prompt in prompts
        for sample in range(samples)
    ]


def collect(
    sampler: Sampler,
    requests: Sequence[Request],
    product: Path,
    *,
    batch_size: int,
    ranks: Ranks,
    title: str,
) -> list[Response]:
    """Answer all requests and return the responses in the order of the requests.

    Every rank appends its share, answer by answer, to a file of its own beside `product`; rank 0
    joins them when all are there. A second start skips the batches that are complete.
    """
    if not product.exists():
        parts = product.with_suffix(".parts")
        parts.mkdir(parents=True, exist_ok=True)
        batches = cut(sampler, requests, batch_size)
        _work(sampler, batches, product, parts, ranks, title)
        if ranks.main:
            _join(parts, [(r.prompt_id, r.sample) for r in requests], product)
        wait_for(product)
    responses = read_records(product, lambda record: Response(**record))
    if [_asked(response) for response in responses] != [_asked(request) for request in requests]:
        raise DataError(f"{product} does not hold the answers that were asked for; remove it")
    return responses


def _asked(one: Request | Response) -> tuple[str, int, int, float]:
    return one.prompt_id, one.sample, one.round, one.temperature


def _work(
    sampler: Sampler,
    batches: list[list[Request]],
    product: Path,
    parts: Path,
    ranks: Ranks,
    title: str,
) -> None:
    done = _read_parts(parts)
    mine = [
        batch
        for batch in batches[ranks.rank :: ranks.world]
        if not all((r.prompt_id, r.sample) in done for r in batch)
    ]
    # Where an earlier start left nothing to do, rank 0 may have joined and removed the parts.
    if not mine or product.exists():
        return
    share = f" (rank 0 of {ranks.world})" if ranks.world > 1 else ""
    own = parts / f"rank-{ranks.rank}.jsonl"
    _mend_tail(own)
    with own.open("a", encoding="utf-8") as file, progress_bar(ranks.main) as progress:
        task = progress.add_task(f"{title}{share}", total=sum(map(len, mine)), rate="")
        tokens = 0
        for request, completion in sampler.sample(mine):
            response = Response(
                prompt_id=request.prompt_id,
                sample=request.sample,
                round=request.round,
                temperature=request.temperature,
                text=completion.text,
                tokens=completion.tokens,
                finished=completion.finished,
            )
            file.write(canonical(asdict(response)) + "\n")
            file.flush()
            tokens += completion.tokens
            elapsed = progress.tasks[0].elapsed or 1e-9
            progress.update(task, advance=1, rate=f"{tokens / elapsed:.0f} tokens/s")


def _join(parts: Path, wanted: Sequence[Key], product: Path) -> None:
    """Wait until every wanted answer is there, then write them in one file, in order."""
    while not (answers := _read_parts(parts)).keys() >= set(wanted):
        time.sleep(1.0)
    write_jsonl(product, (answers[key] for key in wanted))
    shutil.rmtree(parts, ignore_errors=True)


def _read_parts(parts: Path) -> dict[Key, dict[str, object]]:
    answers: dict[Key, dict[str, object]] = {}
    for part in sorted(parts.glob("rank-*.jsonl")):
        with contextlib.suppress(FileNotFoundError):  # joined and removed meanwhile
            for _, record in read_jsonl(part, torn_tail=True):
                answers[record["prompt_id"], record["sample"]] = record
    return answers


def _mend_tail(path: Path) -> None:
    """Cut off the half line that a killed writer left."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)
