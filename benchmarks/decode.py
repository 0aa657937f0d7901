"""Decoding one answer: 4 and 8 bits in the runtime against llama.cpp on the package's own Q4_1.

Both read the same prompt, then write 128 tokens of greedy search, in a process of its own each
round. llama-cpp-python lives in `.venv-bench`, which `make bench` sets up.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from common import MODEL, in_turn, policy_bundle, write

TOKENS, WARM, ROUNDS = 128, 8, 5
PROMPT = "How can I fall asleep more easily?"
LLAMA_PYTHON = Path(".venv-bench/bin/python")
LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, tokens, count, warm = json.loads(sys.argv[1])
model = Llama(path, n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)
model.eval(tokens)
for step in range(count + warm):
    if step == warm:
        started = time.perf_counter()
    model.eval([int(model.scores[model.n_tokens - 1].argmax())])
print(json.dumps(count / (time.perf_counter() - started)))
"""


def ours(variant: str) -> float:
    """Tokens a second, in this process."""
    from dataclasses import replace

    from cai_scale.runtime.generate import Generator, Policy, Request

    policy = Policy(policy_bundle(), variant)
    policy.stops = frozenset()
    tokens = tuple(policy.chat.encode([{"role": "user", "content": PROMPT}]))
    decoding = replace(policy.decoding, temperature=0.0, max_new_tokens=TOKENS + WARM)
    generator = Generator(policy, rows=1)
    generator.add(Request(tokens=tokens, decoding=decoding, id=PROMPT))
    for _ in range(WARM):
        generator.step()
    started = time.perf_counter()
    while generator.busy:
        generator.step()
    return TOKENS / (time.perf_counter() - started)


def main() -> None:
    from cai_scale.training.aliases import ALIASES, packaged
    from cai_scale.training.models import load_tokenizer

    gguf = str(packaged(MODEL, ALIASES[MODEL]))
    prompt = load_tokenizer(MODEL).apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    policy_bundle()

    def llama() -> float:
        return _run(str(LLAMA_PYTHON), "-c", LLAMA, json.dumps([gguf, prompt, TOKENS, WARM]))

    def runtime(variant: str) -> float:
        return _run(sys.executable, __file__, "--variant", variant)

    contestants = {"llama.cpp Q4_1": llama} | {
        f"onnx {name}": lambda name=name: runtime(name) for name in ("q4", "q8", "fp32")
    }
    write({"tokens": TOKENS, **in_turn(contestants, ROUNDS)})


def _run(*command: str) -> float:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    if "--variant" in sys.argv:
        print(ours(sys.argv[sys.argv.index("--variant") + 1]))
    else:
        main()
