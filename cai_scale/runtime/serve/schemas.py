"""What a request may say. What this server cannot do is refused by name, never ignored."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

CHOICES = 8  # answers to one prompt
PROMPTS = 32  # prompts of one completion
ITEMS = 256  # responses scored in one request
TOP_K = 1000  # more would slow down everyone's step
TOP_LOGPROBS = 20  # the most that the protocol has

# Fields of the protocol that are not supported, with the values that ask for nothing. A chat has
# `logprobs` and `top_logprobs`; a completion does not.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}

Finite = Field(allow_inf_nan=False)


def _unicode(text: str) -> str:
    """JSON can escape half a surrogate pair, which no tokenizer reads."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("not Unicode text")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A JSON object without unknown keys; a number is a number and a text is a text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _joined(content: Any) -> Any:
    """Parts that are all text, as one text; anything else is left for the check to refuse."""
    if isinstance(content, list) and content:
        parts = [_text_part(part) for part in content]
        if all(part is not None for part in parts):
            return "\n".join(part for part in parts if part is not None)
    return content


def _text_part(part: Any) -> str | None:
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        return part["text"] if isinstance(part["text"], str) else None
    return None


class Message(Body):
    """One turn of a conversation; `content` is a text, or a list of text parts."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined)]


class StreamOptions(Body):
    """`include_usage` adds a last chunk with the count of tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Body):
    """What both kinds of completion share. None takes the bundle's own value.

    `top_k`, `min_p` and `repetition_penalty` go beyond the protocol. `user` changes nothing.
    """

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2), Finite] | None = None
    top_p: Annotated[float, Field(gt=0, le=1), Finite] | None = None
    top_k: Annotated[int, Field(ge=1, le=TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1), Finite] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10), Finite] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if value is not None and not (key in NEUTRAL and value in NEUTRAL[key])
        }

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: needs stream: true")
        return self

    @property
    def likeliest(self) -> int | None:
        """How many log-probabilities are told beside each token's; None where that is not."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] = 0

    @model_validator(mode="after")
    def _check_one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one setting; give one")
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        if self.logprobs and self.stream:
            raise ValueError("logprobs: not supported in a stream; leave one of them out")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class TextRequest(Sampling):
    """The body of POST /v1/completions: a text to go on from, or several."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=PROMPTS)]

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Item(Body):
    """A response to score, with what was asked."""

    prompt: Text = ""
    response: Text


class ScoreRequest(Body):
    """The body of POST /v1/score: one prompt and response, or `items`."""

    prompt: Text | None = None
    response: Text | None = None
    items: Annotated[list[Item], Field(min_length=1, max_length=ITEMS)] | None = None

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        single = self.response is not None
        if single == (self.items is not None) or (self.items and self.prompt is not None):
            raise ValueError("give a prompt and a response, or items")
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, response), in order."""
        if self.items is not None:
            return [(item.prompt, item.response) for item in self.items]
        return [(self.prompt or "", self.response or "")]
