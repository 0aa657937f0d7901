"""The base install is the runtime: these modules work where torch cannot be imported."""

from pathlib import Path
from typing import Any

from cai_scale.records import read_jsonl
from processes import run_python

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = {"torch", "transformers", "trl", "peft", "deepspeed", "accelerate", "datasets",
           "onnx", "onnxscript", "optimum", "rich", "matplotlib", "pandas", "safetensors"}
sys.meta_path.insert(0, Block())
"""


def test_torch_free_modules_do_their_work_without_torch() -> None:
    result = run_python(
        "-c",
        BLOCK
        + """
import cai_scale.config, cai_scale.errors, cai_scale.prompts, cai_scale.records, cai_scale.runs
from cai_scale import constitution, prompts
from cai_scale.critics import load_critic
import cai_scale.runtime.serve.app, cai_scale.runtime.serve.command
import cai_scale.runtime.generate, cai_scale.runtime.chat, cai_scale.runtime.cli
import cai_scale.evaluation.drift, cai_scale.evaluation.refusals, cai_scale.evaluation.relevance
critic = load_critic("lexicon", constitution.load())
print(critic.score(["x"], ["a useful tip"])[0].overall, len(prompts.load("heldout")))
""",
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["0.75", "120"]


def test_scoring_and_generating_need_no_torch(bundle: Path) -> None:
    code = BLOCK + "from cai_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    scored = run_python(
        "-c", code, "score", "--bundle", str(bundle), "--prompt", "x", "--response", "a c n"
    )
    assert (scored.returncode, scored.stderr) == (0, "")
    assert '"overall"' in scored.stdout
    answered = run_python(
        "-c", code, "generate", "--bundle", str(bundle), "--prompt", "Why?", "--max_new_tokens", "5"
    )
    assert (answered.returncode, answered.stderr) == (0, "")


def test_verifying_tracing_and_auditing_need_no_torch(finished_run: Any, bundle: Path) -> None:
    code = BLOCK + "from cai_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    for path in (finished_run.path, bundle):
        verified = run_python("-c", code, "verify", str(path))
        assert (verified.returncode, verified.stderr) == (0, "")
    prompt_id = next(record["id"] for _, record in read_jsonl(finished_run.prompts("train")))
    traced = run_python("-c", code, "trace", prompt_id, "--run", str(finished_run.path))
    assert (traced.returncode, traced.stderr) == (0, "")
    audited = run_python("-c", code, "audit", "--run", str(finished_run.path))
    assert (audited.returncode, audited.stderr) == (0, "")


def test_training_without_its_extra_is_one_line() -> None:
    code = (
        BLOCK
        + """
import importlib.util
real = importlib.util.find_spec
import cai_scale.cli as cli, cai_scale.commands as commands
commands.find_spec = lambda name: None if name in BLOCKED else real(name)
sys.exit(cli.train([]))
"""
    )
    result = run_python("-c", code)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "error: training needs torch, which is not installed; pip install 'cai-scale[train]'"
    )


def test_the_block_blocks() -> None:
    """The control: what these tests forbid does fail there."""
    result = run_python("-c", BLOCK + "import cai_scale.training.callbacks")
    assert "No module named 'transformers'" in result.stderr
