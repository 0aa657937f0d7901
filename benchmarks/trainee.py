"""One training of `training.py`, in a process of its own, which takes steps when it is told to.

Each line of standard input is a number of steps; each line of standard output is what they took.
The end of the input ends the training, and leaves its adapter in `--into`.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from cai_scale.config import Config
from cai_scale.methods import dpo, load_method, rlaif
from cai_scale.preferences.pairs import read_pairs
from cai_scale.ranks import Ranks
from cai_scale.records import Answer, Pair, Prompt, Response, Score
from cai_scale.runs import Run
from cai_scale.training import adapters, fit, models
from cai_scale.training.precision import Precision
from cai_scale.training.scorer import at_last_token
from cai_scale.training.task import Task

LENGTH = 512


class Turns(TrainerCallback):
    """Lets the training go on by as many steps as are asked for, and prints what they took."""

    def __init__(self, loaded: int) -> None:
        self.loaded, self.left = loaded, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._next(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if not self.left:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken = {
                "seconds": time.perf_counter() - self.started,
                "tokens": int(state.num_input_tokens_seen) - self.tokens,
                "memory": peak() - self.loaded,
            }
            print(json.dumps(taken), flush=True)
            self._next(state, control)

    def _next(self, state: Any, control: Any) -> None:
        self.left = int(sys.stdin.readline() or 0)
        control.should_training_stop = not self.left
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
        self.tokens, self.started = int(state.num_input_tokens_seen), time.perf_counter()


def held() -> int:
    """Bytes that the model's device has given to this process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak() -> int:
    """The most there were since the last turn began."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def watch(trainer: Trainer, loaded: int) -> Trainer:
    trainer.args.include_num_input_tokens_seen = "non_padding"
    trainer.add_callback(Turns(loaded))
    return trainer


def ours(given: argparse.Namespace, config: Config, pairs: list[Pair]) -> None:
    """The project's method, as one process without DeepSpeed has it."""
    loaded: list[int] = []
    policy, train = fit.policy, fit.fit

    def load(task: Task) -> Any:
        model = policy(task)
        loaded.append(held())
        return model

    fit.policy = load
    fit.fit = lambda task, trainer, **more: train(task, watch(trainer, loaded[0]), **more)
    task = Task(
        config=config,
        ranks=Ranks(),
        precision=Precision(given.precision, "asked for"),
        ds_config=None,
        into=Run(given.into),
        pairs=pairs,
        answers=answers(pairs),
        references=given.into / "references.json",
    )
    load_method(config.method).train(task)


def stock(given: argparse.Namespace, config: Config, pairs: list[Pair]) -> None:
    """TRL's DPOTrainer, or transformers' Trainer with rlaif's loss, as their users write them."""
    dtype = getattr(torch, given.weights)
    model = AutoModelForCausalLM.from_pretrained(models.resolve(config.model), dtype=dtype)
    if torch.cuda.is_available():
        model.to("cuda")
    loaded = held()
    common = {
        "output_dir": str(given.into),
        "per_device_train_batch_size": given.rows,
        "gradient_accumulation_steps": config.batch_size // given.rows,
        "gradient_checkpointing": given.checkpointing,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(config.epochs * len(pairs) / config.batch_size) // 10,
        "bf16": given.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": config.seed,
        "dataloader_drop_last": True,
    }
    tokenizer = models.load_tokenizer(config.model)
    if config.method == "dpo":
        trainer: Trainer = DPOTrainer(
            model=model,
            args=DPOConfig(precompute_ref_log_probs=True, max_length=LENGTH, **common),
            train_dataset=dpo.dataset(pairs),
            processing_class=tokenizer,
            peft_config=adapters.lora(config),
        )
    else:
        from peft import get_peft_model

        model.score = nn.Linear(model.config.hidden_size, 1)
        rows = rlaif.rows(answers(pairs), tokenizer, LENGTH)
        trainer = PlainTrainer(
            model=get_peft_model(model, adapters.lora(config, whole=["score"])),
            args=TrainingArguments(remove_unused_columns=False, **common),
            train_dataset=rows,
            data_collator=lambda batch: rlaif.batch(batch, tokenizer.pad_token_id),
        )
    watch(trainer, loaded).train()
    trainer.save_model(str(given.into / "adapter"))


class PlainTrainer(Trainer):
    """The loss of rlaif over transformers' own logits and states."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], **_: Any) -> Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        losses = nn.functional.cross_entropy(
            outputs.logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
        )
        lm = (losses * mask[:, 1:]).sum(-1) / mask[:, 1:].sum(-1)
        last = at_last_token(outputs.hidden_states[-1], mask).float()
        predicted = model.base_model.model.score(last).squeeze(-1)
        scores = torch.tensor(inputs["scores"], device=ids.device)
        return rlaif.loss(lm, predicted, scores, 0.05)


def answers(pairs: list[Pair]) -> list[Answer]:
    """Both answers of each pair."""
    return [
        Answer(
            prompt=Prompt(id=pair.prompt_id, messages=pair.messages),
            response=Response(
                prompt_id=pair.prompt_id,
                sample=sample,
                round=1,
                temperature=one.temperature,
                text=one.text,
                tokens=0,
                finished=True,
            ),
            score=Score({}, one.score),
        )
        for pair in pairs
        for sample, one in enumerate((pair.chosen, pair.rejected))
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("ours", "stock"))
    parser.add_argument("--model")
    parser.add_argument("--method", choices=("dpo", "rlaif"))
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--batch", type=int, help="pairs or answers a step")
    parser.add_argument("--rows", type=int, help="of these, at once")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--weights", default="float32", help="stock: what the model is loaded in")
    parser.add_argument("--checkpointing", action="store_true", help="stock")
    given = parser.parse_args()
    given.into.mkdir(parents=True)
    set_seed(0)  # the adapter that both begin with
    config = Config(
        method=given.method,
        model=given.model,
        epochs=given.epochs,
        batch_size=given.batch,
        micro_batch_size=given.rows,
        max_length=LENGTH,
    )
    train = ours if given.who == "ours" else stock
    train(given, config, read_pairs(given.pairs))


if __name__ == "__main__":
    main()
