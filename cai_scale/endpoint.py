"""What every client of an OpenAI-compatible server needs: address, key, and what an error means.

The API key is read from the environment variable OPENAI_API_KEY and stands nowhere else: in no
file, and in no message.
"""

import email.utils
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cai_scale.errors import ConfigError, ServerError

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI, OpenAIError

KEY = "OPENAI_API_KEY"
CHECK_SECONDS = 5  # for a server to say which models it has
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between tries, where the server names none


def check_url(url: str, flag: str) -> None:
    """Complain about an address that is malformed, or holds what should be kept secret; `flag`
    is what it was given by."""
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        well_formed = False
    else:
        if parts.username is not None or parts.password is not None:
            raise ConfigError(f"{flag} holds a password; take it out, and set {KEY} instead")
    if not well_formed or parts.query or parts.fragment:
        raise ConfigError(f"{flag} {url!r}: expected an address such as http://host:8000/v1")


def _key() -> str:
    """The API key, or a word in its place for servers that want none."""
    key = os.environ.get(KEY, "") or "none"
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{KEY} holds a character that no key has; set it again")
    return key


def client(url: str, *, timeout: float) -> "OpenAI":
    """A client that asks once; `timeout` is in seconds."""
    from openai import OpenAI

    return OpenAI(base_url=url, api_key=_key(), timeout=timeout, max_retries=0)


def async_client(url: str, *, timeout: float) -> "AsyncOpenAI":
    """The same, for many requests at once."""
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=url, api_key=_key(), timeout=timeout, max_retries=0)


def models_of(url: str, flag: str) -> list[str]:
    """What the server at an address lists at /models; `flag` is what the address was given by.

    Raises:
        ConfigError: the address or the key is malformed.
        ServerError: the server does not answer within seconds.
    """
    check_url(url, flag)
    from openai import OpenAIError

    with client(url, timeout=CHECK_SECONDS) as asking:
        try:
            return model_names(asking)
        except OpenAIError as error:
            raise ServerError(
                f"server {url} does not answer at /models ({reason(error)}); start it, or mend "
                f"{flag}, which as a rule ends in /v1"
            ) from None


def answers(url: str, model: str, timeout: float) -> bool:
    """Whether the model at an address writes a token within so many seconds."""
    from openai import OpenAIError

    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    with client(url, timeout=timeout) as asking:
        try:
            asking.post("/chat/completions", cast_to=object, body=body)
        except OpenAIError:
            return False
    return True


def check_model(url: str, names: Sequence[str], model: str, flag: str) -> None:
    """Complain about a model that the server does not list; `flag` is what it was given by."""
    if model not in names:
        known = ", ".join(names[:5]) or "none"
        raise ServerError(
            f"server {url} has no model {model!r}, its models: {known}; name one of them with "
            f"{flag}"
        )


def model_names(client: "OpenAI") -> list[str]:
    """What the server lists at /models."""
    from openai import OpenAIError

    try:
        return [str(model.id) for model in client.models.list()]
    except (AttributeError, TypeError, ValueError):
        raise OpenAIError("not a list of models") from None


def passing(error: "OpenAIError") -> bool:
    """Whether the same request may succeed later."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, APIConnectionError)


def pause(error: "OpenAIError", tries: int) -> float:
    """Seconds to the next try: what the server asks for, or longer each time, and not all alike."""
    response = getattr(error, "response", None)
    asked = _seconds(response.headers.get("retry-after", "")) if response is not None else None
    if asked:
        return asked
    return float(min(FIRST_PAUSE * 2 ** min(tries, 16), LONGEST_PAUSE)) * random.uniform(0.75, 1)


def _seconds(retry_after: str) -> float | None:
    """What the header Retry-After says, in seconds from now; None where it says nothing."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after, re.ASCII):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def reason(error: "OpenAIError") -> str:
    """What went wrong, on one short line that does not hold the key."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        body = error.body
        said = body.get("message", "") if isinstance(body, Mapping) else body
        if error.status_code in (401, 403):
            said = f"set {KEY}"
        text = f"{error.status_code} {said or ''}"
    elif isinstance(error, APIConnectionError):
        text = str(error.__cause__ or error) or str(error)
    else:
        text = str(error)
    key = os.environ.get(KEY)
    text = text.encode("utf-8", "replace").decode()
    text = " ".join((text.replace(key, "…") if key else text).split())
    return text if len(text) <= 200 else text[:199] + "…"
