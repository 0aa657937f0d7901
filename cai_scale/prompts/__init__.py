"""Prompts: the two bundled sets, and the files and datasets that users bring."""

from cai_scale.prompts.load import HELDOUT, TRAIN, digest, load

__all__ = ["HELDOUT", "TRAIN", "digest", "load"]
