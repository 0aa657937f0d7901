"""The server's routes in process, with a model of a few lines: what is refused, and how."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai_scale.runtime.serve import schemas
from fake_server import FakeChat, FakePolicy, make_fake, words_of

CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_fake().app, base_url="http://localhost") as client:
        yield client


def refused(response: Any, status: int) -> str:
    """The message of an error in the protocol's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])


def test_an_answer_is_what_the_policy_gives_at_that_seed(client: TestClient) -> None:
    body = {"messages": HELLO, "seed": 7, "n": 3, "max_tokens": 9}
    reply = client.post(CHAT, json=body).json()
    request = client.app.state if False else None
    del request
    from cai_scale.runtime.generate import Request
    from dataclasses import replace

    for sample, choice in enumerate(reply["choices"]):
        expected, finished = words_of(
            Request(
                tokens=tuple(FakeChat().encode(HELLO)),
                decoding=replace(FakePolicy.decoding, max_new_tokens=9),
                id="hello",
                seed=7,
                sample=sample,
            )
        )
        assert choice["message"]["content"] == "".join(expected)
        assert choice["finish_reason"] == ("stop" if finished else "length")
    assert len({choice["message"]["content"] for choice in reply["choices"]}) == 3
