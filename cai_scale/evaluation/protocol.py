"""How the evaluation samples. Frozen: a test holds these values, and no tuning touches them."""

from cai_scale.runtime.sampling import Decoding

DECODING = Decoding(temperature=0.7, top_p=0.95, top_k=50, max_new_tokens=96)
SEED = 0
BATCH_SIZE = 30
TIE = 0.01  # a difference of overall scores below this is a tie
RESAMPLES = 10_000
