"""Stands for the module of that name until it is merged."""

from collections.abc import Sequence


def available() -> bool:
    return False


def relevance(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    raise NotImplementedError
