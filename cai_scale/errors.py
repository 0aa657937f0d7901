"""Errors that a user can act on: what, the value, the remedy, in one line."""


class CaiError(Exception):
    """Base of the errors that end a command with one line on stderr."""

    exit_code = 2


class ConfigError(CaiError, ValueError):
    """A setting, flag or file of settings is wrong."""


class DataError(CaiError, ValueError):
    """A data file is malformed; the message names the row and the column."""


class MissingError(CaiError, FileNotFoundError):
    """Something that a command needs does not exist; the message says how to get it."""


class ServerError(CaiError, ConnectionError):
    """A server that a command asks does not answer, or not as it should."""


class BudgetError(CaiError):
    """What a command was allowed to spend is spent."""


class IntegrityError(CaiError):
    """A file is not the one that was written: a wrong hash, shape or key."""


class GateError(CaiError):
    """A check of a result failed (parity, an audit): the input was fine, the outcome is not."""

    exit_code = 1
