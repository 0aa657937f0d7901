"""What happens beside the training steps."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cai_scale.records import canonical


class MetricsLog(TrainerCallback):
    """Append what the trainer logs to a JSON Lines file, on the main rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            figures = {k: v for k, v in logs.items() if isinstance(v, int | float) and v == v}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(canonical({"step": state.global_step, **figures}) + "\n")
