"""Started once by a launcher: roll out, and train by several methods under several ds_configs.

worker.py FOLDER MODEL CONSTITUTION PROMPTS DATA METHODS CONFIG [CONFIG …]; DATA holds the
pairs.jsonl with its audit and the rollouts.jsonl to train on, METHODS is like dpo,rlaif, and a
CONFIG is the name of a DeepSpeed file, or "none". What is trained goes to FOLDER/CONFIG/METHOD.
"""

import sys
from pathlib import Path


def main() -> None:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder, model, constitution, prompts, data = map(Path, arguments[:5])
    methods, configs = arguments[5].split(","), arguments[6:]

    from accelerate.state import AcceleratorState, GradientState

    from cai_scale import labels, pipeline, ranks
    from cai_scale.config import Config
    from cai_scale.job import start
    from cai_scale.preferences.pairs import read_pairs
    from cai_scale.records import Response, Score, read_json, read_records, write_json
    from cai_scale.runs import Round

    stored = Round(data)
    pairs = read_pairs(stored.pairs)
    responses = read_records(stored.rollouts, lambda row: Response(**row))
    scores = read_records(
        stored.scores(stored.rollouts), lambda row: row["score"] and Score(**row["score"])
    )
    for name in configs:
        for method in methods:
            # One process trains several times: forget what the training before has set up.
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            config = Config(
                method=method,
                model=str(model),
                constitution=str(constitution),
                prompts=str(prompts),
                eval_prompts=str(prompts),
                precision="fp32",
                ds_config=None if name == "none" else f"{name}.json",
                sampler="auto" if method == "dpo" else "transformers",
                max_new_tokens=20,
                rollout_batch_size=8,
                margin=0.01,
                batch_size=4,
                micro_batch_size=2,
                steps=5 if method == "grpo" else 20,
                learning_rate=1e-3,
                lora_r=4,
                lora_alpha=8,
                reward_outputs="principles",
            )
            job = start(config, folder / name / method)
            if (name, method) == (configs[0], "dpo"):
                pipeline.collect(job, 1)
            elif job.ranks.main:
                write_json(job.run.round(1).audit, read_json(stored.audit))
            ranks.wait_for(job.run.round(1).audit)
            answers = labels.scored(job.prompts, responses, scores)
            pipeline.train(job, 1, answers, pairs)
    ranks.leave()


if __name__ == "__main__":
    main()
