"""`cai-export`: a finished run becomes a bundle."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cai_scale import constitution as constitutions
from cai_scale import prompts, runs
from cai_scale.commands import Parser, one_line, require
from cai_scale.errors import ConfigError, DataError
from cai_scale.records import Prompt, Response, read_json, read_records, write_json
from cai_scale.runtime import bundle as layout
from cai_scale.runtime.bundle import open_bundle
from cai_scale.training.logs import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXACT_SEQUENCES = 12


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """`cai-export --merge-lora`."""
    parser = Parser(
        prog="cai-export",
        description="Export a finished run: merge its adapter, write the ONNX graphs, compare them "
        "with the trained model, and only then write the bundle.",
        epilog="example: cai-export --merge-lora --run runs/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--merge-lora", action="store_true", help="merge the run's LoRA adapter")
    parser.add_argument("--run", type=Path, help="a finished run (default: the newest in runs/)")
    parser.add_argument(
        "--reward", type=Path, help="a finished run of a reward model, or its folder, to score with"
    )
    parser.add_argument("--output", type=Path, help="the bundle's folder (default: RUN/bundle)")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle in --output")
    options = parser.parse_args(arguments)
    run = runs.finished(options.run)
    if not options.merge_lora:
        raise ConfigError(f"{run.path} holds a LoRA adapter; add --merge-lora to export it merged")
    target = options.output or run.bundle
    _check_target(target, overwrite=options.overwrite)
    require("exporting", "export", "torch", "transformers", "peft", "onnx", "onnxscript")
    aside = target.with_name(f".{target.name}.partial")
    try:
        _start_folder(aside)
        digest = export(run, aside, options.reward)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        run.keep_export(target / layout.MANIFEST, digest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"bundle: {target}\nmanifest sha256: {digest}")
    return 0


def export(run: runs.Run, folder: Path, reward: Path | None = None) -> str:
    """Write a bundle of `run` into an empty folder; return the SHA-256 of its manifest.

    Args:
        reward: where a reward model lies, for the bundle to score with; see `reward.find`.

    Raises:
        CaiError: the run cannot be exported, or a parity gate does not hold.
    """
    from .bundle import write_card, write_manifest, write_model_files
    from .graph import trace
    from .merge import check_run, merge
    from .normalise import normalise
    from .parity import MIN_TOKENS, check_answers, check_close, check_exact
    from .quantise import quantise
    from .reward import find
    from .scorer import describe, export_scorer

    quiet()
    constitution = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    fp32, q8 = folder / layout.GRAPHS["fp32"], folder / layout.GRAPHS["q8"]
    fp32.parent.mkdir()
    with Console().status("checking the run") as status:
        check_run(run)
        source = None if reward is None else find(reward, constitution)
        from cai_scale.training.models import load_tokenizer

        sequences = _sequences(run, load_tokenizer(run.settings()["model"]), MIN_TOKENS)
        status.update("merging the adapter")
        merged = merge(run, sequences[:EXACT_SEQUENCES])
        status.update("tracing the graph (a minute or two)")
        _save(normalise(trace(merged.model)), fp32)
        status.update("quantising to 8 bits")
        quantise(fp32, q8)
        status.update("comparing with torch")
        parity = {
            "schema": 1,
            "merge": {"max_abs_logit_delta": merged.max_delta},
            "fp32": check_exact(fp32, merged.model, sequences[:EXACT_SEQUENCES]),
            "q8": check_close(q8, merged.model, sequences, "q8"),
        }
        if source is not None:
            status.update("exporting the reward model (a minute or two)")
            parity["reward"] = export_scorer(source, _answers(run), folder)
    _report(parity)
    write_model_files(folder, merged, default="q8")
    write_json(folder / layout.CONSTITUTION, constitution.data)
    write_json(folder / layout.PARITY, parity)
    write_card(folder, run, constitution, parity)
    scorer = None if source is None else describe(source)
    digest = write_manifest(folder, run, constitution, default="q8", reward=scorer)
    check_answers(open_bundle(folder), merged, [p.text for p in prompts.load(prompts.HELDOUT)])
    return digest


def _sequences(run: runs.Run, tokenizer: "PreTrainedTokenizerBase", tokens: int) -> list[list[int]]:
    """Held-out conversations as tokens, as many as hold `tokens` and more."""
    sequences: list[list[int]] = []
    for conversation in _answers(run):
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)
        sequences.append(list(ids["input_ids"]))
        if sum(map(len, sequences)) > tokens and len(sequences) >= EXACT_SEQUENCES:
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


def _save(model: Any, path: Path) -> None:
    import onnx_ir

    onnx_ir.save(model, str(path), external_data=path.name + layout.WEIGHTS_SUFFIX)


def _report(parity: dict[str, Any]) -> None:
    exact, close = parity["fp32"], parity["q8"]
    worst = max(d for modes in exact["max_abs_logit_delta"].values() for d in modes.values())
    print(f"fp32 against torch: max |Δ logit| {worst:.1e} (at most {exact['bound']:.0e})")
    print(
        f"q8 against torch: KL {close['kl']:.4f} (at most {close['bounds']['kl']}), top-1 "
        f"{close['top1']:.4f} (at least {close['bounds']['top1']}) over {close['tokens']} tokens"
    )
    if "reward" in parity:
        exact, close = parity["reward"]["fp32"], parity["reward"]["q8"]
        print(
            f"reward model against torch: fp32 max |Δ| {max(exact['max_abs_delta'].values()):.1e} "
            f"(at most {exact['bound']:.0e}), q8 Spearman {close['spearman']:.4f} (at least "
            f"{close['bounds']['spearman']}) over {close['texts']} texts"
        )


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"output {target} is a file or a link; choose a folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / layout.MANIFEST).is_file():
            raise ConfigError(
                f"output {target} holds files that are not a bundle's; choose another"
            )
        if not overwrite:
            raise ConfigError(
                f"output {target} already holds a bundle; choose another or add --overwrite"
            )


def _start_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"output {folder.parent} cannot be written ({error.strerror}); choose another folder"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
