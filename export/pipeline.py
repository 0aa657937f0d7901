"""The stages of an export, in order; the only place where they meet."""

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cai_scale import constitution as constitutions
from cai_scale import prompts, runs
from cai_scale.errors import DataError
from cai_scale.records import Prompt, Response, read_json, read_records, write_json
from cai_scale.runtime import bundle as layout
from cai_scale.runtime.bundle import open_bundle
from cai_scale.training.logs import quiet

from .parity import MAX_DELTA, MIN_TOKENS, Bounds, Reference, check_answers, greedy_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .variants import Variant

MERGE_SEQUENCES = 4


def export(
    run: runs.Run,
    folder: Path,
    names: Sequence[str],
    bounds: Bounds,
    reward: Path | None = None,
) -> str:
    """Write a bundle of `run` into an empty folder; return the SHA-256 of its manifest.

    Args:
        names: the variants to keep, of `layout.VARIANTS`, if they are inside the bounds.
        reward: where a reward model lies, for the bundle to score with; see `reward.find`.

    Raises:
        CaiError: the run cannot be exported, or a parity gate does not hold.
    """
    quiet()
    from cai_scale.training.models import load_tokenizer

    from .bundle import write_card, write_manifest, write_model_files
    from .merge import check_run, merge
    from .reward import find
    from .scorer import describe, export_scorer, report
    from .variants import choose, compare, derive

    constitution = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    asked = [prompt.text for prompt in prompts.load(prompts.HELDOUT)]
    with Console().status("checking the run") as status, tempfile.TemporaryDirectory() as aside:
        check_run(run)
        source = None if reward is None else find(reward, constitution)
        sequences = _sequences(run, load_tokenizer(run.settings()["model"]), MIN_TOKENS)
        status.update("merging the adapter")
        merged = merge(run, sequences[:MERGE_SEQUENCES])
        status.update("tracing the graph (a minute or less)")
        (folder / "onnx").mkdir()
        files = {"fp32": _write_fp32(folder, merged.model)}
        status.update("asking the trained model")
        reference = Reference(Path(aside), merged.model, sequences)
        answer = greedy_answer(merged.model, merged.tokenizer, asked[-1])
        merged.model.to("meta")  # its weights are on disk by now
        gc.collect()  # and what tracing left behind
        for name in dict.fromkeys(names):
            if name != "fp32":
                status.update(f"writing {name}")
                files[name] = derive(folder, name, files["fp32"])
        found = []
        for name, written in files.items():
            status.update(f"comparing {name} with the trained model")
            found.append(compare(folder, name, written, reference))
        if source is not None:
            status.update("exporting the reward model (a minute or two)")
            scorer = export_scorer(source, _answers(run), folder)
    if "fp32" not in names:
        found[0].remove()
    kept, default = choose([variant for variant in found if variant.name in names], bounds)
    parity = {
        "schema": 1,
        "sequences": len(sequences),
        "tokens": reference.tokens,
        "bounds": {"fp32_max_abs_logit_delta": MAX_DELTA, **asdict(bounds)},
        "merge": {"max_abs_logit_delta": merged.max_delta},
        "variants": {variant.name: variant.figures for variant in found},
        **({} if source is None else {"reward": scorer}),
    }
    _report(kept, default)
    if source is not None:
        print(report(scorer))
    write_model_files(folder, merged, default.graph)
    write_json(folder / layout.CONSTITUTION, constitution.data)
    write_json(folder / layout.PARITY, parity)
    write_card(folder, run, constitution, parity, kept)
    digest = write_manifest(
        *(folder, run, constitution),
        {variant.name: variant.files for variant in kept},
        default.name,
        None if source is None else describe(scorer),
    )
    answers = {**dict.fromkeys(asked), asked[-1]: answer}
    check_answers(open_bundle(folder), merged.tokenizer, answers)
    return digest


def _write_fp32(folder: Path, model: "PreTrainedModel") -> dict[str, str]:
    """The contract graph and, where onnxruntime-genai's builder can make one, the fused one."""
    from .fuse import fuse
    from .graph import trace
    from .normalise import normalise
    from .variants import write

    graphs = {"graph": normalise(trace(model))}
    fused = fuse(model)
    if fused is None:
        print(f"no fused graph: onnxruntime-genai has none for {type(model).__name__} as it is")
    else:
        graphs["fused"] = fused
    return write(folder, "fp32", graphs)


def _sequences(run: runs.Run, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> list[list[int]]:
    """Held-out conversations as tokens, as many as hold `tokens` and more."""
    sequences: list[list[int]] = []
    for conversation in _answers(run):
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)
        sequences.append(list(ids["input_ids"]))
        if sum(map(len, sequences)) > tokens:
            break
    return sequences


def _answers(run: runs.Run) -> list[list[dict[str, str]]]:
    """Held-out conversations: prompts with the answers of the trained model.

    The bundled prompts follow, each as its own answer, for where answers are few.
    """
    source = run.settings()["eval_prompts"]
    asked = {prompt.id: prompt for prompt in prompts.load(source)}
    answers = read_records(run.evaluation("after"), lambda record: Response(**record))
    if not asked.keys() >= {answer.prompt_id for answer in answers}:
        raise DataError(f"prompts {source} are not those of {run.path}; restore the file")
    conversations = [_conversation(asked[a.prompt_id], a.text) for a in answers]
    return conversations + [_conversation(p, p.text) for p in prompts.load("heldout")]


def _conversation(prompt: Prompt, answer: str) -> list[dict[str, str]]:
    return [*prompt.messages, {"role": "assistant", "content": answer}]


def _report(variants: Sequence["Variant"], default: "Variant") -> None:
    for variant in variants:
        for kind, figures in variant.figures.items():
            deltas = figures["max_abs_logit_delta"]
            worst = max(delta for modes in deltas.values() for delta in modes.values())
            print(
                f"{variant.name}, {kind}: KL {figures['kl']:.4f}, top-1 {figures['top1']:.4f}, "
                f"max |Δ logit| {worst:.1e}"
            )
    print(f"default: {default.name}, the smallest, {default.bytes / 1e6:.0f} MB")
