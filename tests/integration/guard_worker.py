"""Started once by a launcher: trainings under a guard, one after another.

guard_worker.py FOLDER MODEL CONFIG [CONFIG …]; a CONFIG is the name of a DeepSpeed file, or
"none". Each trains an adapter and a whole model by sft; what is trained goes to FOLDER/CONFIG-lora
and FOLDER/CONFIG-whole.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder, model, configs = Path(arguments[0]), Path(arguments[1]), arguments[2:]

    from accelerate.state import AcceleratorState, GradientState

    from cai_scale import ranks
    from cai_scale.config import read_ds_config
    from cai_scale.methods import sft
    from cai_scale.records import Score
    from cai_scale.training.logs import quiet
    from tasks import task
    from test_guard import DATA

    class Rising:
        """Better from look to look, and within one better for saying a letter."""

        name, calls = "rising", 0

        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
            self.calls += 1
            return [Score({}, 0.1 * self.calls + min(9, r.count("a")) / 100) for r in responses]

    quiet()
    peers = ranks.from_environment()
    ranks.join(peers, deepspeed=any(name != "none" for name in configs))
    for name in configs:
        for lora in (True, False):
            # One process trains several times: forget what the run before has set up.
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            into = folder / f"{name}-{'lora' if lora else 'whole'}"
            into.mkdir(parents=True, exist_ok=True)
            made = task(
                model,
                into,
                **{
                    **DATA,
                    **{"method": "sft", "lora": lora, "guard_steps": 2, "learning_rate": 1e-3},
                    **{"critic": Rising(), "ranks": peers},
                    "ds_config": None if name == "none" else read_ds_config(f"{name}.json"),
                },
            )
            sft.train(made)
            ranks.wait_for(made.into.adapter, made.into.model)
    ranks.leave()


if __name__ == "__main__":
    main()
