"""Started once by a launcher: roll out and train under several ds_configs, one after another.

worker.py FOLDER MODEL CONSTITUTION PROMPTS PAIRS CONFIG [CONFIG …]; a CONFIG is the name of a
DeepSpeed file, or "none".
"""

import sys
from pathlib import Path


def main() -> None:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder, model, constitution, prompts, pairs_file = map(Path, arguments[:5])
    configs = arguments[5:]

    from accelerate.state import AcceleratorState, GradientState

    from cai_scale import pipeline, ranks
    from cai_scale.config import Config
    from cai_scale.job import start
    from cai_scale.methods import load_method
    from cai_scale.preferences.pairs import read_pairs

    pairs = read_pairs(pairs_file)
    for name in configs:
        # One process trains several times: forget what the run before has set up.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        config = Config(
            model=str(model),
            constitution=str(constitution),
            prompts=str(prompts),
            eval_prompts=str(prompts),
            precision="fp32",
            ds_config=None if name == "none" else f"{name}.json",
            max_new_tokens=20,
            rollout_batch_size=8,
            margin=0.01,
            batch_size=4,
            micro_batch_size=2,
            epochs=2.0,
            learning_rate=3e-3,
            lora_r=4,
            lora_alpha=8,
        )
        job = start(config, folder / name)
        if name == configs[0]:
            pipeline.collect_pairs(job)
        load_method("dpo").train(
            config,
            pairs,
            job.run,
            ranks=job.ranks,
            precision=job.precision,
            ds_config=job.ds_config,
        )
        ranks.wait_for(job.run.adapter)
    ranks.leave()


if __name__ == "__main__":
    main()
