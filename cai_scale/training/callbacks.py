"""What happens beside the training steps."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from cai_scale.records import canonical, read_jsonl, write_jsonl


class MetricsLog(TrainerCallback):
    """Append what the trainer logs to a JSON Lines file, on the main rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the steps after the checkpoint from which the training continues."""
        if state.is_world_process_zero and self.path.exists():
            records = [record for _, record in read_jsonl(self.path, torn_tail=True)]
            write_jsonl(self.path, (r for r in records if r["step"] <= state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            figures = {k: v for k, v in logs.items() if isinstance(v, int | float) and isfinite(v)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(canonical({"step": state.global_step, **figures}) + "\n")


class AtStart(TrainerCallback):
    """Call a function before the first step: the model is placed and sharded as it is trained."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.act()


class ProgressBar(ProgressCallback):
    """The trainer's progress bar with the named figures beside it, in place of printed logs."""

    def __init__(self, **shown: str) -> None:
        """
        Args:
            shown: what to call a figure, and its key in the logs.
        """
        super().__init__()
        self.shown = shown

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            figures = {name: logs[key] for name, key in self.shown.items() if key in logs}
            self.training_bar.set_postfix(figures, refresh=False)
