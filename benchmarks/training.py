"""Training: the project's dpo and rlaif against TRL's and transformers' own trainers.

The same pairs, seed, LoRA and batches; a token is real that is no padding, and counts once for
each row that holds it. The trainers run in processes of their own and take a step each in turn.
TRL's DPOTrainer has its reference log-probabilities computed beforehand, as ours has; its batch
size, checkpointing and weights' format are those with which it was quickest.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import MODEL, in_turn, policy_bundle, seconds, write

from cai_scale import prompts
from cai_scale.records import Candidate, Pair, write_jsonl
from cai_scale.runtime.generate import Policy, Request
from cai_scale.training import models

PAIRS, BATCH, TURNS, STEPS = 24, 8, 5, 50
EPOCHS = 100  # more steps than are asked for
BETA = 0.1


@dataclass
class Trainee:
    """A training under way in another process."""

    process: "subprocess.Popen[str]"
    into: Path

    def step(self, count: int = 1) -> dict[str, float]:
        """Seconds, real tokens, and bytes at the peak above the loaded model."""
        assert self.process.stdin is not None
        print(count, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                found: dict[str, float] = json.loads(line)
                return found
        raise RuntimeError(f"a training ended with exit code {self.process.wait()}")

    def finish(self) -> Path:
        """Let it save; the adapter."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.process.wait():
            raise RuntimeError(f"a training ended with exit code {self.process.returncode}")
        return self.into / "adapter"


def start(
    stack: ExitStack,
    folder: Path,
    who: str,
    method: str,
    precision: str,
    *,
    batch: int,
    rows: int,
    epochs: int = EPOCHS,
    **stock: Any,
) -> Trainee:
    """Start a training on the pairs in `folder`; it is ended with the stack."""
    into = Path(tempfile.mkdtemp(dir=folder)) / "run"
    flags = {
        **{"model": MODEL, "method": method, "precision": precision, "into": into},
        **{"pairs": folder / "pairs.jsonl", "batch": batch, "rows": rows, "epochs": epochs},
        **{name: value for name, value in stock.items() if not isinstance(value, bool)},
    }
    process = subprocess.Popen(
        [
            *(sys.executable, Path(__file__).with_name("trainee.py"), who),
            *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
            *(f"--{name}" for name, value in stock.items() if value is True),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    stack.callback(process.kill)
    return Trainee(process, into)


def rate(taken: dict[str, float]) -> float:
    return taken["tokens"] / taken["seconds"]


def sample(path: Path) -> list[Pair]:
    """Two answers of the default model to each of the first prompts; which is chosen is nothing
    to the time."""
    policy = Policy(policy_bundle(), "fp32")
    asked = prompts.load("train")[:PAIRS]
    requests = [
        Request(
            tokens=tuple(policy.chat.encode(prompt.messages)),
            decoding=policy.decoding,
            id=prompt.id,
            sample=sample,
        )
        for prompt in asked
        for sample in range(2)
    ]
    texts = [answer.text for answer in policy.complete(requests, rows=2 * PAIRS)]
    pairs = [
        Pair(
            prompt_id=prompt.id,
            language=prompt.language,
            messages=prompt.messages,
            chosen=Candidate(text=chosen, score=0.8, temperature=0.7, revised=False),
            rejected=Candidate(text=rejected, score=0.6, temperature=1.0, revised=False),
        )
        for prompt, chosen, rejected in zip(asked, texts[::2], texts[1::2], strict=True)
    ]
    write_jsonl(path, pairs)
    return pairs


def best(folder: Path, method: str, precision: str, batch: int) -> tuple[dict[str, Any], Any]:
    """The settings with which the stock trainer is quickest, and how quick each was."""
    formats = ["float32"] if precision == "fp32" else ["bfloat16", "float32"]
    tried = [{"rows": batch, "weights": one} for one in formats]
    tried += [
        {"rows": batch // 2, "weights": formats[0]},
        {"rows": batch // 4, "weights": formats[0]},
    ]
    tried += [{"rows": batch, "weights": formats[0], "checkpointing": True}]
    found = []
    for settings in tried:
        with ExitStack() as stack:
            trainee = start(stack, folder, "stock", method, precision, batch=batch, **settings)
            trainee.step()
            taken = trainee.step()
        found.append({"rate": rate(taken), "memory": taken["memory"], **settings})
        print(method, precision, found[-1], file=sys.stderr)
    quickest = max(range(len(tried)), key=lambda i: found[i]["rate"])
    return tried[quickest], found


def compare(folder: Path, method: str, precision: str, batch: int) -> dict[str, Any]:
    """Steps in turn: real tokens a second; bytes above the loaded model at the peak, the whole
    batch at once."""
    settings, tried = best(folder, method, precision, batch)
    with ExitStack() as stack:
        begin = partial(start, stack, folder, method=method, precision=precision, batch=batch)
        trainees = {"stock": begin(who="stock", **settings), "ours": begin(who="ours", rows=batch)}
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in trainees}

        def measured(name: str) -> float:
            trainees[name].step()  # warm again: what it freed before has gone back to the system
            taken[name].append(trainees[name].step(2))
            return rate(taken[name][-1])

        rates = in_turn({name: partial(measured, name) for name in trainees}, TURNS)
    at_once = next(one["memory"] for one in tried if one["weights"] == settings["weights"])
    memory = {"stock": at_once, "ours": max(one["memory"] for one in taken["ours"])}
    return {"rates": rates, "memory": memory, "stock settings": settings, "tried": tried}


def same(folder: Path, pairs: list[Pair], formats: dict[str, str]) -> dict[str, Any]:
    """How far apart trainings are after `STEPS` steps: log-probabilities of answers and margins
    of pairs, in fp32, from the adapters that they leave.

    Args:
        formats: what the stock trainer's model is loaded in, by precision.
    """
    found = {}
    for precision in ("fp32", "bf16"):
        for who in ("stock", "ours"):
            weights = {} if who == "ours" else {"weights": formats[precision]}
            with ExitStack() as stack:
                trainee = start(
                    stack, folder, who, "dpo", precision,
                    batch=2, rows=2, epochs=-(-STEPS * 2 // PAIRS), **weights,
                )  # fmt: skip
                trainee.step(STEPS)
                found[f"{who} {precision}"] = log_probs(pairs, trainee.finish())
            print("trained", who, precision, file=sys.stderr)
    base, exact = log_probs(pairs, None), found["stock fp32"]
    return {
        name: {
            "log-probabilities": float(((one - exact) / exact).abs().max()),
            "margins": float((margins(one, base) - margins(exact, base)).abs().max()),
            "margin": float(margins(one, base).mean()),
        }
        for name, one in found.items()
    }


def margins(found: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    moved = found - base
    return BETA * (moved[:, 0] - moved[:, 1])


def log_probs(pairs: list[Pair], adapter: Path | None) -> torch.Tensor:
    """[pairs, 2], float64: of the chosen and the rejected answer."""
    model = models.load_trained(MODEL, adapter, torch.float32)
    tokenizer = models.load_tokenizer(MODEL)
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for row, pair in enumerate(pairs):
        prompt, *wholes = (
            tokenizer.apply_chat_template(list(messages), return_dict=True, **more)["input_ids"]
            for messages, more in (
                (pair.messages, {"add_generation_prompt": True}),
                *(
                    ([*pair.messages, {"role": "assistant", "content": one.text}], {})
                    for one in (pair.chosen, pair.rejected)
                ),
            )
        )
        for column, whole in enumerate(wholes):
            ids = torch.tensor([whole])
            with torch.inference_mode():
                logs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            own = logs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            found[row, column] = own.sum()
    return found


def peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations a second of the matrix products of a layer, 1,024 tokens at once; 8,192 on a
    GPU."""
    config = models.load_config(MODEL)
    hidden, inner = config.hidden_size, config.intermediate_size
    tokens = 1024 if device == "cpu" else 8192
    shapes = [(hidden, hidden), (hidden, inner), (inner, hidden)]
    given = [
        (torch.randn(tokens, i).to(device, dtype), torch.randn(i, o).to(device, dtype))
        for i, o in shapes
    ]

    def products() -> None:
        for one, other in given:
            one @ other
        if device == "cuda":
            torch.cuda.synchronize()

    products()
    taken = statistics.median(seconds(products) for _ in range(50))
    return 2 * tokens * sum(i * o for i, o in shapes) / taken


def operations(pairs: list[Pair]) -> float:
    """What a real token of dpo needs, with every prompt read twice: forward and backward through
    the frozen layers, LoRA with its gradients, the head for answers, no reference."""
    from peft import get_peft_model

    from cai_scale.config import Config
    from cai_scale.training import adapters

    model = models.load_model(MODEL, torch.float32)
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.layers.parameters())
    lora = get_peft_model(model, adapters.lora(Config())).get_nb_trainable_parameters()[0]
    tokenizer = models.load_tokenizer(MODEL)
    prompt = whole = 0
    for pair in pairs:
        for one in (pair.chosen, pair.rejected):
            messages = [*pair.messages, {"role": "assistant", "content": one.text}]
            whole += len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
            prompt += len(
                tokenizer.apply_chat_template(
                    list(pair.messages), add_generation_prompt=True, return_dict=True
                )["input_ids"]
            )
    return 4 * layers + 6 * lora + 4 * head * (whole - prompt) / whole


def main() -> None:
    peaks = {"fp32": peak(torch.float32), "bf16": peak(torch.bfloat16)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = sample(folder / "pairs.jsonl")
        dpo = {one: compare(folder, "dpo", one, BATCH) for one in peaks}
        formats = {one: found["stock settings"]["weights"] for one, found in dpo.items()}
        result = {
            "operations": operations(pairs),
            "peak": peaks,
            "dpo": dpo,
            "rlaif": {one: compare(folder, "rlaif", one, 2 * BATCH) for one in peaks},
            "same": same(folder, pairs, formats),
        }
    write(result)


if __name__ == "__main__":
    main()
