"""What every command line of the project shares: one-line errors, and missing extras."""

import argparse
import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NoReturn

from cai_scale.errors import CaiError, ConfigError, MissingError

LONGEST = 2000  # characters of a complaint


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")


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
            return _say(str(error), error.exit_code)
        except BrokenPipeError:  # the reader of our output, such as `head`, has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:  # a full disk, a name that is too long, no permission
            name = str(error.filename or "")[:100]
            return _say(f"{error.strerror or error}: {name}; choose another file or folder", 2)
        except KeyboardInterrupt:
            return 130

    return wrapped


def _say(message: str, exit_code: int) -> int:
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
