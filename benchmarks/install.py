"""The base install: what it adds, how fast it imports, how soon and how large a model is ready."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import in_turn, policy_bundle, write

ROUNDS = 5
IMPORT = """
import time; started = time.perf_counter()
import cai_scale.runtime
from cai_scale.runtime import generate
print(time.perf_counter() - started)
"""
# Resident memory is read from the kernel's own account, peak and now.
READY = """
import json, re, sys, time
from pathlib import Path
def resident(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.generate import Policy
before = resident("VmRSS")
started = time.perf_counter()
policy = Policy(open_bundle(Path(sys.argv[1])), sys.argv[2])
ready = time.perf_counter() - started
loaded = resident("VmRSS")
policy.answer([[{"role": "user", "content": "Hi"}]])
print(json.dumps({"seconds": ready, "before": before, "loaded": loaded, "peak": resident("VmHWM"),
                  "answering": resident("VmRSS")}))
"""


def main() -> None:
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "venv"
        _run(sys.executable, "-m", "venv", str(environment))
        python = str(environment / "bin" / "python")
        _run(python, "-m", "pip", "install", "--quiet", ".")
        packages = next((environment / "lib").glob("python*/site-packages"))
        own = [packages / "cai_scale", packages / "cai_export", *packages.glob("cai_scale-*")]
        result["base install, MB"] = {
            "cai-scale": sum(map(_megabytes, own)),
            "with its libraries": _megabytes(packages),
        }
        bundle = str(policy_bundle().path.resolve())
        result["import, seconds"] = in_turn(
            {"cai_scale.runtime": lambda: float(_run(python, "-c", IMPORT))}, ROUNDS
        )
        found = [json.loads(_run(python, "-c", READY, bundle, "q8")) for _ in range(ROUNDS)]
    result["8 bits ready"] = {
        key: sorted(each[key] for each in found)[ROUNDS // 2] for key in found[0]
    }
    variant = policy_bundle().manifest["variants"]["q8"]
    result["8 bits on disk, MB"] = _megabytes(policy_bundle().path / (variant["graph"] + "_data"))
    write(result)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files if p.suffix != ".pyc") / 1e6


if __name__ == "__main__":
    main()
