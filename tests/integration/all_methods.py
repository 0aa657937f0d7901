"""Started once a model: train by every method, export, answer and score, all in one process.

all_methods.py FOLDER [flags of the main job …]; runs go to FOLDER/METHOD.
"""

import sys
from pathlib import Path

METHODS = ("sft", "reward", "dpo", "rlaif", "grpo")


def main() -> None:
    folder, flags = Path(sys.argv[1]), sys.argv[2:]

    from accelerate.state import AcceleratorState, GradientState
    from cai_export.cli import main as export

    from cai_scale import cli

    def run(command: list[str], code: int) -> None:
        if code:
            raise SystemExit(f"{command}: exit code {code}")

    for method in METHODS:
        # One process trains several times: forget what the training before has set up.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        command = [*flags, "--method", method, "--output", str(folder / method)]
        if method == "dpo":  # on the scores of the reward model before it, among others
            command += ["--critic", f"lexicon*0.5+reward:{folder / 'reward'}*0.5", "--margin", "0"]
        run(command, cli.train(command))
    for method in METHODS:
        if method != "reward":
            command = ["--merge-lora", "--run", str(folder / method), "--min-top1", "0.8"]
            command += ["--reward", str(folder / "reward")] if method == "dpo" else []
            run(command, export(command))


if __name__ == "__main__":
    main()
