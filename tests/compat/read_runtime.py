"""This project's runtime reads a bundle: `python read_runtime.py BUNDLE VARIANT < prompts`.

Like every reader here it takes a JSON list of prompts on stdin, applies the bundle's chat
template and tokenizer, searches greedily, and prints the new tokens of each as JSON.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cai_scale.runtime.bundle import open_bundle
from cai_scale.runtime.generate import Policy

NEW_TOKENS = 20


def numbers(tokens: Sequence[int]) -> str:
    """The runtime answers in text; a decoder that writes numbers shows which tokens it chose."""
    return "".join(f"{token} " for token in tokens)


policy = Policy(open_bundle(Path(sys.argv[1])), sys.argv[2])
policy.chat.decode = numbers  # type: ignore[method-assign]
greedy = replace(policy.decoding, temperature=0.0, max_new_tokens=NEW_TOKENS)
prompts = json.load(sys.stdin)
answers = policy.answer([({"role": "user", "content": prompt},) for prompt in prompts], greedy)
print(json.dumps([[int(token) for token in answer.text.split()] for answer in answers]))
