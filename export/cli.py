"""`cai-export`: a finished run becomes a bundle."""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cai_scale import runs
from cai_scale.commands import Parser, one_line, require
from cai_scale.errors import ConfigError
from cai_scale.runtime import bundle as layout

from .parity import Bounds


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
    parser.add_argument(
        *("--variants",), nargs="+", choices=layout.VARIANTS, default=["fp32", "q8"],
        help="number formats to export: fp32, fp16, q8, q4 (default: fp32 q8)",
    )  # fmt: skip
    parser.add_argument(
        *("--max-kl",), type=_number, default=Bounds.kl,
        help="leave variants out that are farther from the trained model, in nats "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        *("--min-top1",), type=_number, default=Bounds.top1,
        help="leave variants out that find the same likeliest token less often "
        "(default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    run = runs.finished(options.run)
    if run.settings()["method"] == "reward":
        raise ConfigError(
            f"{run.path} trained a reward model, which scores and does not answer; export the run "
            f"of another method with --reward {run.path}"
        )
    if not options.merge_lora and not run.model.is_dir():
        raise ConfigError(f"{run.path} holds a LoRA adapter; add --merge-lora to export it merged")
    target = options.output or run.bundle
    _check_target(target, overwrite=options.overwrite)
    require(
        "exporting",
        "export",
        "torch",
        "transformers",
        "peft",
        "onnx",
        "onnxscript",
        "onnxruntime_genai",
    )
    from .pipeline import export

    bounds = Bounds(options.max_kl, options.min_top1)
    aside = target.with_name(f".{target.name}.partial")
    started = time.monotonic()
    try:
        _start_folder(aside)
        digest = export(run, aside, options.variants, bounds, options.reward)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        run.keep_export(target / layout.MANIFEST, digest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"bundle: {target}, in {time.monotonic() - started:.0f} s\nmanifest sha256: {digest}")
    return 0


def _number(text: str) -> float:
    """Of a bound: 0 or more; above 1 a share is never reached, and a divergence always kept."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number, 0 or more")
    return value


_number.__name__ = "number"


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
