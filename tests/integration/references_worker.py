"""Started once by a launcher: DPO from a start under several ds_configs.

references_worker.py FOLDER MODEL ADAPTER WHOLE PRECISION CONFIG [CONFIG …]; a CONFIG is the name
of a DeepSpeed file, or "none". FOLDER/CONFIG/lora continues from ADAPTER, FOLDER/CONFIG/whole from
the model WHOLE; with zero2 and zero3, FOLDER/CONFIG/KIND-again is the same training with the
reference of the first. A file passes-RANK in a training's folder says how many batches of the
reference that rank computed for it.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder, model, adapter, whole = map(Path, arguments[:4])
    precision, configs = arguments[4], arguments[5:]

    from accelerate.state import AcceleratorState, GradientState
    from trl import DPOTrainer

    from cai_scale import ranks
    from cai_scale.config import read_ds_config
    from cai_scale.methods import dpo
    from cai_scale.runs import Run
    from cai_scale.training.logs import quiet
    from cai_scale.training.precision import Precision
    from tasks import pairs, task

    passes, compute = [], DPOTrainer.compute_ref_log_probs

    def counting(*given: Any, **named: Any) -> Any:
        passes.append(1)
        return compute(*given, **named)

    DPOTrainer.compute_ref_log_probs = counting
    quiet()
    peers = ranks.from_environment()
    ranks.join(peers, deepspeed=any(name != "none" for name in configs))
    for name in configs:
        for kind, start in (("lora", adapter), ("whole", whole)):
            for again in ("", "-again") if name in ("zero2", "zero3") else ("",):
                # One process trains several times: forget what the run before has set up.
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
                into = folder / name / (kind + again)
                into.parent.mkdir(parents=True, exist_ok=True)
                passes.clear()
                dpo.train(
                    task(
                        *(model, into),
                        ranks=peers,
                        precision=Precision(precision, "test"),
                        ds_config=None if name == "none" else read_ds_config(f"{name}.json"),
                        references=Run(folder / name / kind).round(1).references,
                        pairs=pairs(8),
                        start=start,
                        lora=kind == "lora",
                        lora_r=16,
                        batch_size=4,
                        micro_batch_size=1,
                        epochs=4.0,
                        learning_rate=1e-3,
                    )
                )
                ranks.wait_for(Run(into).adapter, Run(into).model)
                (into / f"passes-{peers.rank}").write_text(str(len(passes)))
    ranks.leave()


if __name__ == "__main__":
    main()
