"""What requests and replies look like: checked on the way in, described in the OpenAPI document."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from retro import chat

MAX_QUERY_CHARS = 10_000
MAX_STOPS = 16
MAX_FIELDS = 200
MAX_ENTRIES = 1_000_000
"""Of lists that have no lower limit of their own."""


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half a character in it (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""pydantic looks at the characters of texts that have a limit, but not of others."""
_Tokens = Annotated[list[int], Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True)]
# A list is given up at its first wrong entry: a million errors would hold all others up.

K = Annotated[
    int | None,
    Field(ge=0, le=10_000, description="Passages to read; 0 turns retrieval off. Default: the server's."),
]
Method = Annotated[
    Literal["dense", "bm25", "hybrid", "rerank"] | None,
    Field(
        description="dense: by meaning; bm25: by words; hybrid: both; rerank: the best by meaning, ordered by words."
    ),
]
Where = Annotated[
    str | None,
    Field(
        max_length=10_000,
        description="Only documents that fulfil this; it can only narrow what the key allows.",
        examples=['lang = "en" and year >= 2000'],
    ),
]


class Body(BaseModel):
    """A request: no unknown field, no value of another type, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, values: Any) -> Any:
        if isinstance(values, dict) and len(values) > MAX_FIELDS:
            raise ValueError(f"it has {len(values):,} fields, and {MAX_FIELDS} may be known at most")
        return values


# --- as OpenAI's API ----------------------------------------------------------------------------------------------


class StreamOptions(Body):
    """How a reply is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generating(Body):
    """What completions and chats have in common."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
    )
    """Fields of OpenAI's that change no answer here."""
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "logit_bias": (None, {}),
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
    }
    """Fields of OpenAI's that are not supported, and the values that ask for nothing."""

    model: Annotated[str, Field(max_length=1000)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="0 is greedy.")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=1_000_000, description="Not of OpenAI's: 0 means all.")] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    stop: (
        Annotated[str, Field(max_length=1000)]
        | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=MAX_STOPS, fail_fast=True)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    k: K = None
    retriever: Method = None
    where: Where = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        left = {}
        for name, value in values.items():
            if name in cls.ignored:
                continue
            if name in cls.neutral and name not in cls.model_fields:
                if value not in cls.neutral[name]:
                    raise ValueError(f"{name} is not supported by this server")
                continue
            left[name] = value
        return left


class CompletionRequest(Generating):
    """A text to continue; passages are looked up at every chunk border."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128, fail_fast=True)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1000, fail_fast=True)]
    name: Annotated[str | None, Field(max_length=1000)] = None

    @property
    def plain(self) -> chat.Message:
        """Without parts, by a role that models know."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generating):
    """Messages to answer; passages are looked up for the last message of the user."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PassageOut(BaseModel):
    """A passage of a document."""

    number: Annotated[int, Field(description="From 1, best first.")]
    score: float
    key: Annotated[str, Field(description="Of its document.")]
    title: str
    url: str
    text: Annotated[str, Field(description="A chunk of the document and what follows it.")]
    continuation: Annotated[str, Field(description="The part of `text` that follows the chunk.")]
    metadata: dict[str, Any]
    share: Annotated[float | None, Field(description="Of the model's attention while it answered.")] = None
    span: Annotated[
        list[int] | None, Field(description="First and end character of `text` that the answer was taken from.")
    ] = None


class PassageRead(PassageOut):
    """A passage that a continuation read."""

    choice: Annotated[int | None, Field(description="Which choice read it; in completions.")] = None
    chunk: Annotated[int | None, Field(description="From which of its chunks on.")] = None


class RetroOut(BaseModel):
    """What OpenAI's API does not have: what was read."""

    k: int
    retriever: str
    passages: list[PassageRead]


class CompletionLogProbs(BaseModel):
    """Natural logarithms of probabilities of tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogProbs | None


class CompletionReply(BaseModel):
    """As OpenAI's, and what was read."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    retro: RetroOut


class ChatLogProb(BaseModel):
    """A token and its probability."""

    token: str
    logprob: float
    bytes: Annotated[list[int] | None, Field(description="Of a token of whole characters.")]


class ChatToken(ChatLogProb):
    """A token of an answer, and what else was probable there."""

    top_logprobs: list[ChatLogProb]


class ChatLogProbs(BaseModel):
    """Natural logarithms of probabilities of tokens."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(BaseModel):
    """An answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogProbs | None


class ChatReply(BaseModel):
    """As OpenAI's, and what was read."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    retro: RetroOut


# --- our own ------------------------------------------------------------------------------------------------------


class SearchRequest(Body):
    """Look passages up."""

    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARS)]
    k: K = None
    retriever: Method = None
    where: Where = None


class AskRequest(Body):
    """Answer a question from passages."""

    question: Annotated[str, Field(min_length=1, max_length=MAX_QUERY_CHARS)]
    k: K = None
    retriever: Method = None
    where: Where = None
    max_tokens: Annotated[int, Field(ge=1, description="Longest answer.")] = 32
    stream: Annotated[
        bool, Field(description="Server-sent events: `passages`, then `token`s, then `done`, or `error`.")
    ] = False
    attribution: Annotated[bool, Field(description="Say which passages the answer drew on.")] = True


class SearchReply(BaseModel):
    """What was found."""

    passages: list[PassageOut]


class TokenOut(BaseModel):
    """A token of an answer."""

    text: str
    log_prob: Annotated[float, Field(description="Natural logarithm of its probability.")]
    shares: Annotated[list[float] | None, Field(description="Attention to each passage.")]


class Seconds(BaseModel):
    """What took how long."""

    retrieval: float
    decoding: float


class AskReply(BaseModel):
    """An answer with its sources."""

    question: str
    answer: str
    confidence: Annotated[float, Field(description="From 0 to 1.")]
    refused: Annotated[bool, Field(description="Whether the model is not sure enough.")]
    tokens: list[TokenOut]
    passages: list[PassageOut]
    usage: Usage
    seconds: Seconds


class DocumentIn(BaseModel):
    """A document; every other field is kept as metadata, for filters."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    id: Annotated[str, Field(min_length=1, max_length=1000, strict=True)]
    text: Annotated[str, Field(min_length=1, strict=True)]
    title: Annotated[str | None, Field(max_length=10_000, strict=True)] = None
    url: Annotated[str | None, Field(max_length=10_000, strict=True)] = None

    @model_validator(mode="after")
    def _can_be_stored(self) -> "DocumentIn":
        try:
            _unicode(json.dumps(self.model_extra, ensure_ascii=False, allow_nan=False))
        except ValueError as error:
            raise ValueError(f"its metadata cannot be kept: {error}") from None
        return self


class AddRequest(Body):
    """Documents to add to the index."""

    documents: Annotated[list[DocumentIn], Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True)]
    corpus: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Their keys are CORPUS:ID.", examples=["api"])
    ] = "api"
    update: Annotated[bool, Field(description="Replace documents that are there already; else that is an error.")] = (
        False
    )


class RemoveRequest(Body):
    """Documents to remove from the index."""

    keys: Annotated[
        list[Annotated[str, Field(max_length=2000)]], Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True)
    ]


class ChangesReply(BaseModel):
    """What a change of the index did."""

    added: int
    updated: int
    removed: int
    unchanged: int
    keys: list[str]
    documents: Annotated[int, Field(description="Of the index now.")]


class ReloadRequest(Body):
    """Open the index anew, or another one of those that the server was started with."""

    index: Annotated[str | None, Field(max_length=1000)] = None


class ReloadReply(BaseModel):
    """Which index is open."""

    index: str
    documents: int


class ModelRetro(BaseModel):
    """What this server can do."""

    retrieval: bool
    default_k: int
    retrievers: list[str]
    documents: int
    admin: Annotated[bool, Field(description="Whether documents can be added and removed, with the admin key.")]
    max_k: int
    max_tokens: int


class ModelOut(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    retro: ModelRetro


class ModelList(BaseModel):
    """The models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


class State(BaseModel):
    """How the server is."""

    status: Literal["ok", "failed", "ready", "stopping"]
