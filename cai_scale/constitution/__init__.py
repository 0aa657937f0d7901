"""A constitution: principles, their lexicons and the requests made in their name, as data."""

from cai_scale.constitution.schema import (
    Constitution,
    Lexicon,
    Principle,
    TermList,
    from_dict,
    load,
)

__all__ = ["Constitution", "Lexicon", "Principle", "TermList", "from_dict", "load"]
