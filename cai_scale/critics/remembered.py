"""A critic that is asked about an answer once; its scores are kept in a file. No torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cai_scale.critics import Critic
from cai_scale.records import Score, read_records, write_jsonl

Exchange = tuple[str, str]


class Remembered:
    """Asks a critic about what is not in the file yet, and adds what it says.

    A row has the prompt, the response and the score, None where the critic gives none. One
    process writes the file.
    """

    def __init__(self, critic: Critic, file: Path) -> None:
        self.critic, self.file = critic, file
        self.name = critic.name

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        asked = list(zip(prompts, responses, strict=True))
        kept = self._read()
        if new := [exchange for exchange in dict.fromkeys(asked) if exchange not in kept]:
            found = self.critic.score([p for p, _ in new], [r for _, r in new])
            kept |= dict(zip(new, found, strict=True))
            self._write(kept.items())
        return [kept[exchange] for exchange in asked]

    def why(self, prompt: str, response: str) -> str:
        return self.critic.why(prompt, response)

    def _read(self) -> dict[Exchange, Score | None]:
        if not self.file.is_file():
            return {}
        return dict(
            read_records(
                self.file,
                lambda row: (
                    (row["prompt"], row["response"]),
                    None if row["score"] is None else Score(**row["score"]),
                ),
            )
        )

    def _write(self, scores: Iterable[tuple[Exchange, Score | None]]) -> None:
        write_jsonl(
            self.file,
            (
                {"prompt": prompt, "response": response, "score": score and score.plain()}
                for (prompt, response), score in scores
            ),
        )
