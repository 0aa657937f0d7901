"""What an evaluation rests on is frozen: no later tuning touches it."""

import hashlib
import json
from dataclasses import asdict
from importlib import resources

from cai_scale import constitution
from cai_scale.evaluation import protocol


def test_the_default_lexicon() -> None:
    lexicon = [
        [principle["id"], principle["weight"], principle["lexicon"]]
        for principle in constitution.load().data["principles"]
    ]
    text = json.dumps(lexicon, ensure_ascii=False, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "4879ae21fc46b22d0428d941fcf7b703525570f77133a518c303dd028a587c82"
    )


def test_the_heldout_prompts() -> None:
    content = resources.files("cai_scale.prompts").joinpath("heldout.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == (
        "7add1705dd0859b26aab1ef446fb6506e175fe5664b7ac6e8a6cab5c4d4916ea"
    )


def test_the_decoding_of_the_evaluation() -> None:
    assert asdict(protocol.DECODING) == {
        "temperature": 0.7,
        "top_p": 0.95,
        "top_k": 50,
        "max_new_tokens": 96,
        "min_p": 0.0,  # this and what follows change nothing
        "repetition_penalty": 1.0,
        "stop": (),
    }
    assert protocol.SEED == 0
    assert protocol.BATCH_SIZE == 30
    assert protocol.TIE == 0.01
