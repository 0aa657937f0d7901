"""Start real processes of the project, with a deadline."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def serving(
    *arguments: str, timeout: float = 60, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run this interpreter with `arguments` as a server, until the block ends.

    Yields:
        Its URL, which its first line ends with, and the process.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    watch = threading.Timer(timeout, process.kill)
    watch.start()
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert "http://" in line, process.stderr.read()
        yield line.split()[-1], process
    finally:
        watch.cancel()
        process.kill()
        process.communicate()
