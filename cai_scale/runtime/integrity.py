"""The files of a bundle against its manifest, before any of them is opened by a library."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from cai_scale.errors import IntegrityError
from cai_scale.records import sha256
from cai_scale.runtime.external_data import locations

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# Plain relative paths. What is excluded: parent folders, drives, hidden files, and the
# characters that a reader of paths or onnxruntime itself takes for something else.
_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*", re.ASCII)
_LONGEST = 200  # characters of a name


def refused(path: Path, why: str) -> IntegrityError:
    """The error for a bundle that is not as it was exported."""
    return IntegrityError(f"bundle {path} refused: {why}; export it again")


def check(path: Path, files: Mapping[str, str]) -> None:
    """Check a folder against `files`, which maps relative names to their SHA-256.

    Raises:
        IntegrityError: a name points outside the folder; a file is missing or differs; there is
            a link or a pickle, listed or not; a graph's weights lie in a file that is not listed.
    """
    for name in files:
        if not _NAME.fullmatch(name) or len(name) > _LONGEST:
            raise refused(path, f"the name {name[:_LONGEST]!a} points outside the folder")
    _check_folder(path)
    for name, digest in files.items():
        if not (path / name).is_file():
            raise refused(path, f"{name} is missing")
        try:
            found = sha256(path / name)
        except OSError as error:
            raise refused(path, f"{name} cannot be read ({error.strerror})") from None
        if found != digest:
            raise refused(path, f"{name} differs from what was exported")
    for name in files:
        if name.endswith(".onnx"):
            _check_graph(path, name, files)


def _check_folder(path: Path) -> None:
    if path.is_symlink():
        raise refused(path, "the folder is a link")
    for folder, folders, names in os.walk(path):
        for name in folders + names:
            file = Path(folder, name)
            if file.is_symlink():
                raise refused(path, f"{file.relative_to(path)} is a link")
            if file.suffix.lower() in PICKLES:
                raise refused(path, f"{file.relative_to(path)} may be a pickle, which runs code")


def _check_graph(path: Path, name: str, files: Mapping[str, str]) -> None:
    try:
        found = locations(path / name)
    except ValueError as error:
        raise refused(path, f"{name} cannot be loaded as an ONNX graph ({error})") from None
    for location in sorted(found):
        if (PurePosixPath(name).parent / location).as_posix() not in files:
            where = ascii(location[:_LONGEST])
            raise refused(path, f"{name} has weights in {where}, which the manifest does not list")
