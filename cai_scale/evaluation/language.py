"""Whether a text is Vietnamese or English. No torch.

Only these two: Vietnamese writes most words with letters that English has not, and both have short
words that no text goes without.
"""

import re
import unicodedata

VIETNAMESE, ENGLISH = "vi", "en"
# Letters of Vietnamese that French, German or Spanish words in an English text do not bring.
LETTERS = set("ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ")
COMMON = {
    VIETNAMESE: set("và là của có không được cho bạn một những các để".split()),  # noqa: SIM905
    ENGLISH: set("the and of to a is in that it you for are with this can".split()),  # noqa: SIM905
}
FEW = 3  # words; fewer do not tell


def language(text: str) -> str | None:
    """ "vi", "en", or None where the text is neither, or too short to tell.

    Vietnamese is a text of whose words at least a fifth have a Vietnamese letter or are common
    there; English one of whose words at least a tenth are common in English.
    """
    words = re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text).casefold())
    if len(words) < FEW:
        return None

    def share(language: str) -> float:
        own = COMMON[language]
        letters = LETTERS if language == VIETNAMESE else set[str]()
        return sum(word in own or not letters.isdisjoint(word) for word in words) / len(words)

    if share(VIETNAMESE) >= 0.2:
        return VIETNAMESE
    return ENGLISH if share(ENGLISH) >= 0.1 else None


def kept(asked: str, answer: str) -> bool | None:
    """Whether an answer is in the language of its question, "en" or "vi"; None of another
    language, and of an answer that does not tell."""
    found = language(answer)
    return None if asked not in COMMON or found is None else found == asked
