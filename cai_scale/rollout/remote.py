"""Stand-in until the sampler `openai` is merged."""

from typing import Any


def check(url: str, model: str) -> None:
    raise NotImplementedError


class RemoteSampler:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError
