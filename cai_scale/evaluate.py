"""`cai-scale evaluate --bundle A --against B`: two bundles answer the held-out prompts. No torch.

It is the evaluation of a run, with bundles in place of the model before and after: the same
prompts, decoding, seeds, scores and figures, by the same code.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cai_scale import prompts as prompt_files
from cai_scale import results
from cai_scale.commands import Parser, require
from cai_scale.constitution import Constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import ConfigError
from cai_scale.evaluation import protocol
from cai_scale.evaluation.compare import Answered
from cai_scale.evaluation.likelihood import Reader
from cai_scale.ranks import Ranks
from cai_scale.records import Prompt, read_json, sha256, write_json, write_jsonl
from cai_scale.rollout.onnx import OnnxSampler
from cai_scale.runs import ROOT, Run
from cai_scale.runtime.bundle import MANIFEST, TOKENIZER, Bundle, open_bundle
from cai_scale.runtime.generate import ROWS, Policy

FLAGS = ("--bundle", "--against")  # which ask for this, and not for the evaluation of a run
ALONE = Ranks()


def main(arguments: Sequence[str]) -> int:
    """`cai-scale evaluate --bundle A --against B`."""
    parser = Parser(
        prog="cai-scale evaluate",
        description="Let two bundles answer the held-out prompts, and compare the answers as a "
        "run's own evaluation does: scores by the lexicon of A's constitution, the perplexity of "
        "the answers under B, and how far A has moved from B. Needs no torch. What is answered "
        "already is kept: name the same --output to go on.",
        epilog="Without these flags 'cai-scale evaluate' is the main job; see 'cai-scale train "
        "--help' for its flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--bundle", type=Path, required=True, metavar="A", help="after")
    parser.add_argument("--against", type=Path, required=True, metavar="B", help="before: the base")
    parser.add_argument(
        "--prompts",
        default=prompt_files.HELDOUT,
        help="the bundled set 'heldout', or a .jsonl or .csv file (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help=f"a folder (default: {ROOT}/evaluation-TIME)")
    options = parser.parse_args(arguments)
    require("evaluate --bundle", "report", "matplotlib", "rich")
    bundles = {"before": open_bundle(options.against), "after": open_bundle(options.bundle)}
    prompts = prompt_files.load(options.prompts)
    output = options.output or ROOT / f"evaluation-{time.strftime('%Y%m%d-%H%M%S')}"
    Comparison(_open(output, bundles, prompts), bundles, prompts).finish()
    return 0


class Comparison:
    """Two bundles, "before" and "after", and the folder of what they answer."""

    def __init__(self, run: Run, bundles: dict[str, Bundle], prompts: Sequence[Prompt]) -> None:
        self.run, self.bundles, self.prompts = run, bundles, prompts
        self.constitution: Constitution = bundles["after"].constitution
        self.critic = LexiconCritic(self.constitution)
        self.policy = functools.cache(lambda when: Policy(bundles[when]))
        self.seconds: dict[str, float] = {}

    def finish(self) -> None:
        """Answer, measure, compare, report."""
        from cai_scale.evaluation.report import write_report
        from cai_scale.evaluation.table import print_summary

        answered = self.answered()
        summary = self.summary(answered)
        write_report(self.run, summary, answered, self.constitution)
        write_json(self.run.summary, summary)
        print_summary(summary, self.constitution)
        print(f"report: {self.run.report}")

    def answered(self) -> list[Answered]:
        given = {}
        for when in self.bundles:
            with self._timed(f"evaluate {when}"):
                given[when] = results.heldout(
                    self.prompts, self.run, when, self._sampler(when), ALONE
                )
        with self._timed("measure"):
            measured = results.measured(
                self.prompts, self.run, given["before"], given["after"], self._readers, ALONE
            )
        return results.answered(
            self.critic, self.prompts, given["before"], given["after"], measured
        )

    def summary(self, answered: Sequence[Answered]) -> dict[str, Any]:
        before, after = self.bundles["before"], self.bundles["after"]
        return {
            "schema": 1,
            "method": f"{after.path} against {before.path}",
            "model": after.manifest.get("model", after.path.name),
            "constitution": self.constitution.sha256,
            "critic": self.critic.name,
            **results.figures(self.constitution, self.critic, self.critic.name, answered),
            "seconds": self.seconds,
        }

    def _sampler(self, when: str) -> OnnxSampler:
        decoding = asdict(protocol.DECODING)
        settings = {name: decoding[name] for name in ("max_new_tokens", "top_p", "top_k")}
        return OnnxSampler(functools.partial(self.policy, when), None, rows=ROWS, **settings)

    def _readers(self) -> tuple[Reader, Reader | None]:
        base, policy = self.policy("before"), self.policy("after")
        if _same_tokens(*self.bundles.values()) and (
            base.graph.vocabulary == policy.graph.vocabulary
        ):
            return base, policy
        print("the bundles have different tokenizers: the KL between them is not measured")
        return base, None

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = round(time.monotonic() - started, 3)


def _open(output: Path, bundles: dict[str, Bundle], prompts: Sequence[Prompt]) -> Run:
    """The folder of the comparison, new or of the same one.

    Raises:
        ConfigError: it holds something else.
    """
    run = Run(output)
    record = {
        "schema": 1,
        "bundles": {
            when: {"path": str(bundle.path), "sha256": sha256(bundle.path / MANIFEST)}
            for when, bundle in bundles.items()
        },
        "prompts": prompt_files.digest(prompts),
    }
    # A start that was killed at once may leave a file written aside, whose name has a dot.
    if output.exists() and (
        not output.is_dir() or any(not path.name.startswith(".") for path in output.iterdir())
    ):
        if not run.bundles.is_file() or _identity(read_json(run.bundles)) != _identity(record):
            raise ConfigError(
                f"--output {output} holds something else than an evaluation of these bundles by "
                f"these prompts; choose another folder"
            )
    else:
        write_json(run.bundles, record)
    write_json(run.constitution, dict(bundles["after"].constitution.data))
    write_jsonl(run.prompts("heldout"), prompts)
    return run


def _identity(record: dict[str, Any]) -> Any:
    """What a comparison is known by; a bundle may have moved."""
    hashes = {when: bundle["sha256"] for when, bundle in record["bundles"].items()}
    return record["schema"], hashes, record["prompts"]


def _same_tokens(one: Bundle, other: Bundle) -> bool:
    return bool(one.manifest["files"][TOKENIZER] == other.manifest["files"][TOKENIZER])
