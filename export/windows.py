"""Sliding windows counted in tokens, so that padding between them changes nothing.

transformers counts the columns of the attention mask. A row that was padded on the right and
decodes on has a gap among its columns, and would see less than its window.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def windows_in_tokens() -> Iterator[None]:
    """While this is open, models mask their sliding windows by the tokens of each row."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    names = ("sdpa", "eager")
    for name in names:
        MASKS[name] = _in_tokens(MASKS[name])
    try:
        yield
    finally:
        for name in names:
            del MASKS[name]


def _in_tokens(make_mask: Callable[..., Any]) -> Callable[..., Any]:
    def make(*, mask_function: Callable[..., Any], **settings: Any) -> Any:
        window = getattr(settings.get("config"), "sliding_window", None)
        if window is None or settings.get("local_size") != window:
            return make_mask(mask_function=mask_function, **settings)
        tokens = settings["attention_mask"].long().cumsum(-1)  # up to each column

        def within(row: Any, head: Any, query: Any, key: Any) -> Any:
            return mask_function(row, head, tokens[row, query], tokens[row, key])

        return make_mask(mask_function=within, **settings)

    return make
