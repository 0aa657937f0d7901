"""Errors that a user can act on: what, the value, the remedy, in one line."""

import functools
import os
import sys
import time
from collections.abc import Callable


class CaiError(Exception):
    """Base of the errors that end a command with one line on stderr."""

    exit_code = 2


class ConfigError(CaiError, ValueError):
    """A setting, flag or file of settings is wrong."""


class DataError(CaiError, ValueError):
    """A data file is malformed; the message names the row and the column."""


class MissingError(CaiError, FileNotFoundError):
    """Something that a command needs does not exist; the message says how to get it."""


class IntegrityError(CaiError):
    """A file is not the one that was written: a wrong hash, shape or key."""


class GateError(CaiError):
    """A check of a result failed (parity, an audit): the input was fine, the outcome is not."""

    exit_code = 1


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
            rank = int(os.environ.get("RANK", "0"))
            if rank:
                time.sleep(5)
            where = f" (rank {rank})" if rank else ""
            message = " ".join(str(error).split())
            print(f"error{where}: {message}", file=sys.stderr, flush=True)
            return error.exit_code
        except BrokenPipeError:  # the reader of our output, such as `head`, has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            return 130

    return wrapped
