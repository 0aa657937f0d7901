"""What every command line of the project shares: one-line errors, and missing extras."""

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from cai_scale.errors import CaiError, ConfigError, MissingError

LONGEST = 2000  # characters of a complaint


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")

    def add_bundle(self, *, instead: str | None = None, help: str = "") -> None:
        """The flags of a command that opens a bundle, or takes the flag `instead` of one."""
        choice = self.add_mutually_exclusive_group(required=True)
        choice.add_argument("--bundle", type=Path, help="a folder that cai-export wrote")
        if instead is not None:
            choice.add_argument(instead, help=help)
        self.add_argument(
            "--expect-sha256",
            metavar="HASH",
            help="what cai-export printed for the bundle; any other bundle is refused",
        )


def one_line(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn a `CaiError` of a command's main function into one line on stderr and an exit code.

    Under a launcher every rank meets the same mistake of the user. Rank 0 reports it at once;
    the others wait for the launcher to end them and speak only if they outlive that.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except CaiError as error:
            return complain(str(error), error.exit_code)
        except BrokenPipeError:  # the reader of our output, such as `head`, has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:  # a full disk, a name that is too long, no permission
            name = str(error.filename or "")[:100]
            return complain(f"{error.strerror or error}: {name}; choose another file or folder", 2)
        except KeyboardInterrupt:
            return 130

    return wrapped


def complain(message: str, exit_code: int) -> int:
    """Print one line on stderr; return the exit code."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(5)
    where = f" (rank {rank})" if rank != "0" else ""
    line = " ".join(message.split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
    print(f"error{where}: {line}", file=sys.stderr, flush=True)
    return exit_code


def require(command: str, extra: str, *libraries: str) -> None:
    """Complain about a library that a command needs, without importing it.

    Raises:
        MissingError: it is not installed; the message names the extra that brings it.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise MissingError(
                f"{command} needs {library}, which is not installed; "
                f"pip install 'cai-scale[{extra}]'"
            )
