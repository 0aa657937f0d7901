"""Started once by a launcher: GRPO under several ds_configs, one after another.

grpo_worker.py FOLDER MODEL SETTINGS CONFIG [CONFIG …]; SETTINGS is JSON: those of the run, and
"slow", the seconds that the critic of the last rank takes at the second step, with "timeout",
those that a collective may take. A CONFIG is the name of a DeepSpeed file, or "none".
"""

import functools
import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder, model, configs = Path(arguments[0]), Path(arguments[1]), arguments[3:]
    settings = json.loads(arguments[2])
    slow, timeout = settings.pop("slow", 0), settings.pop("timeout", None)

    from accelerate.state import AcceleratorState, GradientState

    from cai_scale import ranks
    from cai_scale.config import read_ds_config
    from cai_scale.methods import grpo
    from cai_scale.records import Score
    from cai_scale.runs import Trained
    from cai_scale.training.logs import quiet
    from test_grpo import Letters, task

    class Critic(Letters):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
            scores = super().score(prompts, responses)
            if self.calls == 2 and peers.rank == peers.world - 1:
                time.sleep(slow)
            return scores

    quiet()
    peers = ranks.from_environment()
    if timeout is not None:
        import torch

        form = torch.distributed.init_process_group
        allowed = timedelta(seconds=timeout)
        torch.distributed.init_process_group = functools.partial(form, timeout=allowed)
    ranks.join(peers, deepspeed=any(name != "none" for name in configs))
    for name in configs:
        # One process trains several times: forget what the run before has set up.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        ds_config = None if name == "none" else read_ds_config(f"{name}.json")
        given = {"critic": Critic(), "ranks": peers, "ds_config": ds_config}
        (folder / name).mkdir(parents=True, exist_ok=True)
        grpo.train(task(model, folder / name, **given, **settings))
        into = Trained(folder / name)
        ranks.wait_for(into.adapter if settings.get("lora", True) else into.model)
    if timeout is not None and slow:  # the control: a collective does not wait that long
        import torch

        if not peers.main:
            time.sleep(slow)
        torch.distributed.all_reduce(torch.ones(1))
    ranks.leave()


if __name__ == "__main__":
    main()
