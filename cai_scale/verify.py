"""`cai-scale verify`: is a run, or a bundle, what was made? Every link is checked. No torch.

Three things are checked of a run: that each file is the one that its stage wrote, that each
stage read what an earlier one wrote, and that what follows from the stored answers (scores,
pairs, the table and its interval) follows from them again.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_scale import chain, runs
from cai_scale.commands import Parser
from cai_scale.errors import CaiError, ConfigError, GateError, MissingError
from cai_scale.records import checksums, json_text, read_json, sha256
from cai_scale.replay import Replay
from cai_scale.runs import Run
from cai_scale.runtime import bundle as layout
from cai_scale.runtime.bundle import open_bundle
from cai_scale.terminal import coloured, wrapped


@dataclass(frozen=True)
class Link:
    """One link: what was found in order, or why it is broken; `ok` is None where it was not
    checked."""

    name: str
    said: str
    ok: bool | None = True


def main(arguments: Sequence[str]) -> int:
    """`cai-scale verify RUN|BUNDLE`."""
    parser = Parser(
        prog="cai-scale verify",
        description="Check a finished run or a bundle, link by link: that every file is the one "
        "that was written, that every stage read what an earlier one wrote, and that the pairs, "
        "scores and figures follow from the stored answers. Exit code 1 where a link is broken.",
        epilog="Hashes that lie beside the data find damage and careless edits. Whoever rewrites "
        "all of it to fit is found only by a hash kept elsewhere: give it with --expect-sha256.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="RUN|BUNDLE", help="the folder to check")
    parser.add_argument("--run", type=Path, help="the run that a bundle was made from")
    parser.add_argument(
        "--expect-sha256",
        metavar="HASH",
        help="what the training printed for the run's chain, or the export for the manifest",
    )
    options = parser.parse_args(arguments)
    path, expected = options.path, options.expect_sha256
    if expected is not None and not re.fullmatch("[0-9a-fA-F]{64}", expected):
        raise ConfigError(f"--expect-sha256 {expected!r}: expected 64 hexadecimal digits")
    expected = expected and expected.lower()
    if (path / layout.MANIFEST).is_file():
        links = verify_bundle(path, run=_run_of(path, options.run), expected=expected)
    elif options.run is not None:
        raise ConfigError(f"--run belongs to a bundle, and {path} is none: it has no manifest.json")
    else:
        links = verify_run(_finished(path), expected=expected)
    for link in links:
        print(_row(link, max(len(link.name) for link in links)))
    broken = [link for link in links if link.ok is False]
    if broken:
        more = f" (and {len(broken) - 1} more)" if broken[1:] else ""
        raise GateError(
            f"{path}: the link {broken[0].name!r} is broken{more}: {broken[0].said}; restore the "
            f"folder from a copy, or make it again"
        )
    return 0


def verify_run(run: Run, *, expected: str | None = None) -> list[Link]:
    """Check a finished run, and the bundles inside it, link by link.

    Args:
        expected: the SHA-256 of `chain.json`, kept elsewhere.
    """
    links = [_link("chain", lambda: _chain(run, expected))]
    if links[0].ok:
        recorded, replay = chain.read(run), Replay(run)
        for name in chain.stages(run):
            links.append(_link(name, functools.partial(_stage, run, name, recorded)))
            work = replay.checks.get(name)
            if work and all(link.ok for link in links):
                worked = _link(name, work)
                said = f"{links[-1].said}; {worked.said}" if worked.ok else worked.said
                links[-1] = Link(name, said, worked.ok)
        links.append(_link("other files", lambda: _other_files(run, recorded)))
    exports = _link("exports", lambda: _exports(run))
    if run.exports.is_file() or not exports.ok:
        links.append(exports)
    for folder in _bundles(run):
        inside = verify_bundle(folder, run=run)
        links += [Link(f"{folder.name}: {link.name}", link.said, link.ok) for link in inside]
    return links


def verify_bundle(path: Path, *, run: Run | None = None, expected: str | None = None) -> list[Link]:
    """Check a bundle link by link.

    Args:
        run: the run that it was made from, where that is at hand.
        expected: the SHA-256 of the manifest, kept elsewhere.
    """
    links = [
        _link("manifest", lambda: _manifest(path, expected)),
        _link("files", lambda: _bundle_files(path)),
    ]
    if run is None:
        return [*links, Link("run", "the run is not at hand; name it with --run", None)]
    return [*links, _link("run", lambda: _bundle_run(path, run))]


def _link(name: str, check: Callable[[], str]) -> Link:
    try:
        return Link(name, check())
    except CaiError as error:
        return Link(name, str(error), ok=False)
    except Exception as error:  # whatever a record of the wrong kind raises on its way
        return Link(name, f"not as it was written ({type(error).__name__}: {error})", ok=False)


def _chain(run: Run, expected: str | None) -> str:
    digest = sha256(run.chain)
    if expected not in (None, digest):
        raise GateError(f"the SHA-256 of chain.json is {digest}, expected {expected}")
    recorded = chain.read(run)
    record = read_json(run.chain)
    if json_text(record) != run.chain.read_bytes().decode("utf-8"):
        raise GateError("chain.json is not laid out as it was written")
    if record.keys() != {"schema", "stages"} or record["schema"] != chain.SCHEMA:
        raise GateError(f"chain.json has schema {record.get('schema')!r}, expected {chain.SCHEMA}")
    names = list(chain.stages(run))
    if list(recorded) != names:
        raise GateError(f"chain.json has the stages {list(recorded)}, expected {names}")
    return f"sha256 {digest}"


def _stage(run: Run, name: str, recorded: dict[str, Any]) -> str:
    """The files that a stage wrote are there as it wrote them; it read what others wrote."""
    read, wrote = recorded[name]["read"], recorded[name]["wrote"]
    removed = chain.removed(run, wrote)
    for file, digest in wrote.items():
        if file in removed:
            continue
        if not (run.path / file).is_file():
            raise GateError(f"{file} is missing")
        if sha256(run.path / file) != digest:
            raise GateError(f"{file} differs from what was written")
    source = {file: digest for link in recorded.values() for file, digest in link["wrote"].items()}
    for file, digest in read.items():
        if source.get(file) != digest:
            raise GateError(f"it read another {file} than was written")
    for file in map(run.name_of, chain.files_of(chain.stages(run)[name].reads)):
        if file not in read:
            raise GateError(f"chain.json does not say which {file} it read")
    note = ", checkpoints since removed" if removed else ""
    return f"{_files(len(wrote) - len(removed))} as written{note}"


def _other_files(run: Run, recorded: dict[str, Any]) -> str:
    known = {file for link in recorded.values() for file in link["wrote"]}
    known |= {run.name_of(path) for path in (run.chain, run.exports)}
    bundles = {folder.name for folder in _bundles(run)}
    for name in _names(run.path):
        if name not in known and name.split("/")[0] not in bundles:
            raise GateError(f"{name} is none of the run's files; move it elsewhere")
    return "none"


def _exports(run: Run) -> str:
    """Each bundle inside the run is pinned, and those that were exported elsewhere if at hand."""
    pinned = run.exported()
    for folder in _bundles(run):
        if f"{folder.name}/{layout.MANIFEST}" not in pinned:
            raise GateError(f"{run.exports.name} has no line for {folder.name}/{layout.MANIFEST}")
    for name, digest in pinned.items():
        manifest = run.path / name
        if manifest.is_file() and sha256(manifest) != digest:
            raise GateError(f"{name} is not the one whose hash {run.exports.name} keeps")
        if not manifest.is_file() and not name.startswith(".."):
            raise GateError(f"{name} is missing; remove its line from {run.exports.name}")
    return f"{len(pinned)} manifest(s), as kept when they were exported"


def _manifest(path: Path, expected: str | None) -> str:
    digest = sha256(path / layout.MANIFEST)
    if expected not in (None, digest):
        raise GateError(f"the SHA-256 of {layout.MANIFEST} is {digest}, expected {expected}")
    beside = path / layout.MANIFEST_DIGEST
    if not beside.is_file():
        raise GateError(f"{beside.name} is missing")
    if beside.read_bytes() != checksums({layout.MANIFEST: digest}).encode():
        raise GateError(f"{layout.MANIFEST} is not the one whose hash {beside.name} keeps")
    return f"sha256 {digest}"


def _bundle_files(path: Path) -> str:
    bundle = open_bundle(path)
    listed = set(bundle.manifest["files"])
    for name in (layout.PARITY, layout.README):
        if name not in listed:
            raise GateError(f"{layout.MANIFEST} does not list {name}")
    for name in _names(path):
        if name not in {*listed, layout.MANIFEST, layout.MANIFEST_DIGEST}:
            raise GateError(f"{name} is not in {layout.MANIFEST}; move it elsewhere")
    return f"{_files(len(listed))} as exported, constitution, parity report and model card among"


def _bundle_run(path: Path, run: Run) -> str:
    named = read_json(path / layout.MANIFEST)["run"]
    for key, file in (("summary", run.summary), ("chain", run.chain)):
        if not file.is_file() or sha256(file) != named[key]:
            raise GateError(f"the manifest names another {file.name} than that of {run.path}")
    if sha256(path / layout.MANIFEST) not in run.exported().values():
        raise GateError(f"{run.exports} does not keep the hash of this manifest")
    return f"made from {run.path}, which keeps the manifest's hash"


def _names(folder: Path) -> list[str]:
    """All files in a folder but those whose name has a dot first: what a killed start left."""
    names = [file.relative_to(folder).as_posix() for file in chain.files_of([folder])]
    return [name for name in names if not f"/{name}".count("/.")]


def _bundles(run: Run) -> list[Path]:
    return sorted(manifest.parent for manifest in run.path.glob(f"*/{layout.MANIFEST}"))


def _finished(path: Path) -> Run:
    run = Run(path)
    if not run.chain.is_file() and not run.config.is_file():
        raise MissingError(f"{path} is neither a run nor a bundle; name the folder of one")
    if run.chain.is_file() and (
        run.finished or '"summary"' in run.chain.read_text("utf-8", errors="replace")
    ):
        return run  # finished once, whatever is missing now
    runs.finished(path)  # complains where it is not
    raise MissingError(
        f"{path} has no {run.chain.name}: it is older than the recording of hashes, or has lost "
        f"the file; make the run again to have it verified"
    )


def _run_of(bundle: Path, named: Path | None) -> Run | None:
    if named is not None:
        return _finished(named)
    beside = Run(bundle.resolve().parent)
    return beside if beside.chain.is_file() else None


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _row(link: Link, width: int) -> str:
    state, colour = {True: ("ok", "green"), False: ("BROKEN", "red"), None: ("–", "dim")}[link.ok]
    margin = " " * (width + 10)
    text = wrapped(link.said, margin).removeprefix(margin)
    return f"{link.name:<{width}}  {coloured(f'{state:<6}', colour)}  {text}"
