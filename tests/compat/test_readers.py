"""One bundle, four readers, each in a process and environment of its own: the same tokens.

`make compat` sets the environments up and runs this.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from cai_scale.records import read_json, sha256, write_json
from cai_scale.runtime import bundle as layout
from processes import ROOT, run_python
from tiny import save_tiny_gpt2

pytestmark = pytest.mark.compat

HERE = Path(__file__).parent
READERS = {
    "runtime": [sys.executable, "read_runtime.py"],
    "optimum": [str(ROOT / ".venv-compat" / "bin" / "python"), "read_optimum.py"],
    "genai": [sys.executable, "read_genai.py"],
    "transformers.js": ["node", "read_js.mjs"],
}
PROMPTS = [
    "Hi",
    "How can I fall asleep more easily?",
    "Làm thế nào để ngủ ngon hơn?",
    "Is it safe to reheat cooked rice after two days in the fridge, or should I throw it away? 🙂",
]


def read(reader: str, bundle: Path, variant: str) -> list[list[int]]:
    """The new tokens of each prompt, without the one that ends an answer."""
    program, script = READERS[reader]
    result = subprocess.run(
        [program, str(HERE / script), str(bundle), variant],
        input=json.dumps(PROMPTS),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    end = read_json(bundle / layout.GENERATION)["eos_token_id"]
    rows = json.loads(result.stdout.splitlines()[-1])
    return [row[: row.index(end)] if end in row else row for row in rows]


@pytest.fixture(scope="session")
def gpt2_bundle(tmp_path_factory: pytest.TempPathFactory, job: list[str]) -> Path:
    """The main job and its export on a GPT-2, which has no chat template."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = save_tiny_gpt2(folder / "model")
    flags = [*job, "--model", str(model), "--output", str(folder / "run")]
    for command in (
        ["cai_scale.launch.train", *flags],
        ["cai_export.cli", "--merge-lora", "--run", str(folder / "run")],
    ):
        result = run_python("-m", *command)
        assert result.returncode == 0, result.stderr
    return folder / "run" / "bundle"


@pytest.fixture(params=["llama", "gpt2"], scope="session")
def exported(request: pytest.FixtureRequest) -> Path:
    fixture = {"llama": "bundle", "gpt2": "gpt2_bundle"}[request.param]
    return Path(request.getfixturevalue(fixture))


@pytest.mark.parametrize("variant", ["fp32", "q8"])
def test_four_readers_choose_the_same_tokens(exported: Path, variant: str) -> None:
    found = {reader: read(reader, exported, variant) for reader in READERS}
    expected = found["runtime"]
    assert all(len(row) >= 16 for row in expected)
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    assert found == dict.fromkeys(READERS, expected)


@pytest.mark.parametrize("reader", READERS)
def test_a_moved_weight_is_seen_by_every_reader(bundle: Path, tmp_path: Path, reader: str) -> None:
    """The control: the comparison fails where one bundle differs in one matrix."""
    moved = Path(shutil.copytree(bundle, tmp_path / "moved"))
    graph = moved / layout.VARIANTS["fp32"]["graph"]
    model = onnx.load(str(graph), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    place = {entry.key: entry.value for entry in tensor.external_data}
    weights = np.memmap(
        graph.with_name(place["location"]),
        np.float32,
        "r+",
        offset=int(place["offset"]),
        shape=tuple(tensor.dims),
    )
    weights[:] = np.roll(weights, 1, axis=0)
    weights.flush()
    manifest = read_json(moved / layout.MANIFEST)
    manifest["files"] = {name: sha256(moved / name) for name in manifest["files"]}
    write_json(moved / layout.MANIFEST, manifest)
    assert read(reader, moved, "fp32") != read(reader, bundle, "fp32")
    assert read(reader, moved, "q8") == read(reader, bundle, "q8")
