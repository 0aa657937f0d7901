"""Imports point one way: a stage imports none of the stages beside it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cai_scale"

# Which packages each may import, beside the modules that hold data and errors.
COMMON = {
    *("errors", "records", "runs", "ranks", "config", "constitution"),
    *("commands", "endpoint", "statistics", "terminal"),
}
ALLOWED = {
    "constitution": set(),
    "critics": set(),
    "prompts": set(),
    "rollout": {"critics", "runtime"},
    "preferences": {"critics"},
    # A task brings a critic and samplers along; methods that sample while they train use them.
    "training": {"critics", "rollout"},
    "methods": {"training"},
    "evaluation": {"critics", "runtime"},
    "runtime": {"critics"},
}
# A reward model as a critic runs what was trained, or a bundle's; only it does, and nothing that
# these two import imports it.
ALSO = {
    "critics/reward.py": {"training", "runtime"},
    "critics/reading.py": {"training", "runtime"},
    # A judge in this process is a model that answers.
    "critics/judge/__init__.py": {"training"},
    "critics/judge/local.py": {"training", "rollout"},
}


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cai_scale":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cai_scale."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("cai_scale.")}
    return found


@pytest.mark.parametrize("stage", ALLOWED)
def test_a_stage_imports_only_what_it_may(stage: str) -> None:
    files = list((PACKAGE / stage).rglob("*.py"))
    assert files
    for file in files:
        also = ALSO.get(file.relative_to(PACKAGE).as_posix(), set())
        others = imported(file) - COMMON - ALLOWED[stage] - also - {stage}
        assert not others, f"{file.name} imports {others}"


def test_every_stage_is_listed() -> None:
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()} == set(ALLOWED)


def test_the_package_itself_imports_nothing() -> None:
    assert imported(PACKAGE / "__init__.py") == set()


def test_an_import_against_the_flow_is_seen(tmp_path: Path) -> None:
    """The control."""
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from cai_scale.evaluation.compare import compare\n")
    assert imported(file) == {"evaluation"}
