"""Start real processes of the project, with a deadline."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(
    *arguments: str, timeout: float = 300, cwd: Path = ROOT, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with `arguments`; stdout and stderr come back as text."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        input=stdin,
        check=False,
    )


def run_deepspeed(
    ranks: int, *arguments: str, timeout: float = 400, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run the deepspeed launcher with `ranks` ranks on this machine."""
    return run_python(
        "-m",
        "deepspeed.launcher.runner",
        *("--num_accelerators", str(ranks)),
        *("--master_port", str(free_port())),
        *arguments,
        timeout=timeout,
        cwd=cwd,
    )


def free_port() -> int:
    """A port that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
