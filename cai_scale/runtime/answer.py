"""`cai-scale generate`: a bundle answers prompts. No torch."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_scale.commands import Parser
from cai_scale.errors import ConfigError
from cai_scale.runtime.bundle import open_bundle

if TYPE_CHECKING:
    from cai_scale.runtime.generate import Policy, Request

DECODING = {
    "max_new_tokens": (int, "longest answer, in tokens"),
    "temperature": (float, "0 takes the likeliest token"),
    "top_k": (int, "draw from this many of the likeliest tokens"),
    "top_p": (float, "draw from the fewest tokens that hold this share of the probability"),
    "min_p": (float, "leave out tokens less likely than this share of the likeliest"),
    "repetition_penalty": (float, "above 1: tokens already there become less likely"),
}


def generate(arguments: Sequence[str] | None) -> int:
    """Print the answer to each prompt."""
    parser = Parser(
        prog="cai-scale generate",
        description="Answer prompts with a bundle's model. One prompt's answer is printed as it "
        "grows; several are answered at once and printed in order, a blank line between them.",
        epilog="example: cai-scale generate --bundle runs/demo/bundle --prompt 'Why is the sky "
        "blue?' --best_of 4",
        allow_abbrev=False,
    )
    parser.add_bundle()
    parser.add_argument(
        "--prompt", action="append", required=True, help="a question; may be given several times"
    )
    parser.add_argument("--system", help="instructions that stand before the question")
    parser.add_argument("--variant", help="such as fp32 or q8 (default: the bundle's own choice)")
    for name, (kind, text) in DECODING.items():
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: the bundle's)")
    parser.add_argument(
        "--stop", action="append", help="end before this text; may be given several times"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another answer")
    parser.add_argument(
        "--best_of", type=int, default=1, metavar="N",
        help="answer N times and print what the constitution's lexicon scores highest",
    )  # fmt: skip
    parser.add_argument(
        "--revise",
        action="store_true",
        help="ask once more where an answer is short, repetitive or under a principle's floor",
    )
    options = parser.parse_args(arguments)
    if not 1 <= options.best_of <= 64:
        raise ConfigError(f"--best_of {options.best_of}: expected a number from 1 to 64")

    from cai_scale.runtime.generate import Policy, Request

    bundle = open_bundle(options.bundle, options.expect_sha256)
    policy = Policy(bundle, options.variant)
    decoding = dataclasses.replace(policy.decoding, **_given(options))
    conversations = [_conversation(prompt, options.system) for prompt in options.prompt]
    requests = [
        Request(
            tokens=tuple(policy.chat.encode(messages)),
            decoding=decoding,
            id=prompt,
            seed=options.seed,
        )
        for prompt, messages in zip(options.prompt, conversations, strict=True)
    ]
    if options.best_of > 1 or options.revise:
        answers = _with_critic(options, bundle.constitution, policy, conversations, requests)
    elif len(requests) == 1:
        _stream(policy, requests[0])
        return 0
    else:
        answers = [answer.text for answer in policy.complete(requests)]
    print("\n\n".join(answers))
    return 0


def _given(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        name: getattr(options, name) for name in DECODING if getattr(options, name) is not None
    }
    return given | ({"stop": tuple(options.stop)} if options.stop else {})


def _conversation(prompt: str, system: str | None) -> tuple[dict[str, str], ...]:
    asked = {"role": "user", "content": prompt}
    return ({"role": "system", "content": system}, asked) if system else (asked,)


def _stream(policy: "Policy", request: "Request") -> None:
    from cai_scale.runtime.generate import Generator

    generator = Generator(policy, rows=1)
    generator.add(request)
    while generator.busy:
        for piece in generator.step():
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    print()


def _with_critic(
    options: argparse.Namespace,
    constitution: Any,
    policy: "Policy",
    conversations: Sequence[Sequence[dict[str, str]]],
    requests: Sequence["Request"],
) -> list[str]:
    from cai_scale.critics.lexicon import LexiconCritic
    from cai_scale.runtime.best import best_of, revise_once

    critic = LexiconCritic(constitution)
    language = constitution.languages[0]
    answers = []
    for messages, request in zip(conversations, requests, strict=True):
        answer = best_of(policy, critic, messages, request, options.best_of)
        if options.revise:
            answer = revise_once(policy, critic, constitution, messages, request, answer, language)
        answers.append(answer.text)
    return answers
