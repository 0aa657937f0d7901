import pytest

from cai_scale import ranks
from cai_scale.errors import ConfigError
from cai_scale.ranks import Ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(0, 1, 0, 1)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
            Ranks(3, 4, 1, 2),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            Ranks(1, 2, 1, 2),
        ),
    ],
)
def test_a_launchers_environment_is_read(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Ranks
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    assert ranks.from_environment() == expected
    assert expected.main is (expected.rank == 0)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "abc"}, "RANK='abc'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "without MASTER_ADDR"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        ranks.from_environment()
