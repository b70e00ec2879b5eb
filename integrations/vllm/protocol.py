"""Bodies of the /v1/edits routes, and the one shape of their errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from ultraedit_kernels._version import __version__

if TYPE_CHECKING:
    from fastapi.responses import JSONResponse

MAX_VERSION = 2**31 - 1
DIGEST = "[0-9a-f]{64}"

ERRORS = {
    400: ("BadRequestError", "invalid"),
    401: ("AuthenticationError", "unauthorized"),
    403: ("PermissionDeniedError", "unauthorized"),
    404: ("NotFoundError", "not_found"),
    405: ("MethodNotAllowedError", "invalid"),
    409: ("ConflictError", "conflict"),
    413: ("RequestTooLargeError", "too_large"),
    422: ("UnprocessableEntityError", "rejected"),
    429: ("RateLimitError", "queue_full"),
    500: ("InternalServerError", "internal"),
    501: ("NotImplementedError", "not_computed"),
    503: ("ServiceUnavailableError", "unavailable"),
}
"""Type of an error, as OpenAI calls it, and its reason in metrics and audit lines, by status."""
RETRY_SECONDS = {429: 5, 503: 5}
"""`Retry-After` of the errors that pass."""

EXPECTED = {
    "body": 'a JSON object, sent with "Content-Type: application/json"',
    "edits": 'a list of at least one edit {"prompt", "target"}',
    "edits[]": 'an edit {"prompt", "target"}',
    "prompt": 'a text, or a list of chat messages {"role", "content"}',
    "target": "the answer that the prompt shall get, as a text",
    "rephrases": "a list of texts or of lists of chat messages",
    "locality": "a list of texts or of lists of chat messages",
    "rephrases[]": "a text, or a list of chat messages",
    "locality[]": "a text, or a list of chat messages",
    "prompt[]": 'a chat message {"role", "content"}',
    "role": 'a text such as "user"',
    "content": "a text",
    "dry_run": "true or false",
    "idempotency_key": "a text of 1 to 255 characters",
    "version": "a whole number, 0 for the untouched model",
    "limit": "a whole number from 1 to 100",
    "digest": "true or false",
    "space": "true, false, or null for what the model would write",
    "serving": "the digest of a version, 64 hexadecimal digits",
    "expected": "the digest of a version, 64 hexadecimal digits",
    "before": "a whole number above 0: list versions below it",
}


class EditError(Exception):
    """A request that cannot be done: HTTP status, what was wrong, and the field it concerns."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param

    @property
    def reason(self) -> str:
        """A word for metrics and audit lines."""
        return ERRORS.get(self.status, ("", "other"))[1]


class Body(BaseModel):
    """A JSON object of a request; an unknown field is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = list(cls.model_fields)
            for name in data:
                if name not in known:
                    raise ValueError(
                        f"unknown field {_show(name)}, expected only {', '.join(known)}; "
                        "remove it or correct its spelling"
                    )
        return data


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds half of a surrogate pair at character {error.start}, expected Unicode text; "
            "send both halves or none"
        ) from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class Message(Body):
    """One chat message."""

    role: Text
    content: Text


Prompt = Annotated[
    Annotated[Text, Tag("text")] | Annotated[list[Message], Tag("messages")],
    Discriminator(lambda value: "messages" if isinstance(value, list) else "text"),
]


class Edit(Body):
    """One edit: the prompt, and the target that it shall be continued with."""

    prompt: Prompt
    target: Text
    rephrases: list[Prompt] = []
    """Other wordings that are taught the same target."""
    locality: list[Prompt] = []
    """Prompts whose answers must stand; also scored, as `specificity`."""
    space: bool | None = None
    """Whether a space joins text prompts and the target; null for what the model would write."""


class EditsBody(Body):
    """Edits that are made together, in one turn."""

    edits: list[Edit] = Field(min_length=1)
    dry_run: bool = False
    """Report what the turn would do, and commit nothing."""
    idempotency_key: Annotated[Text, Field(min_length=1, max_length=255)] | None = None
    """The same key with the same body returns the first answer instead of editing again."""


class RollbackBody(Body):
    """The version to go back to; 0 is the model as it was loaded."""

    version: int = Field(ge=0, le=MAX_VERSION)
    serving: str | None = Field(default=None, pattern=f"^{DIGEST}$")
    """Go back only if the version that is served has this digest."""


class ApplyQuery(BaseModel):
    """How a delta file is applied; an unknown parameter is refused, since without a misspelt
    `dry_run` the delta would be served."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False
    """Check it, guards included, on a shadow of the weights, and commit nothing."""
    idempotency_key: Annotated[Text, Field(min_length=1, max_length=255)] | None = None
    """The same key with the same file is applied once."""
    serving: str | None = Field(default=None, pattern=f"^{DIGEST}$")
    """Apply it only if the version that is served has this digest."""
    expected: str | None = Field(default=None, pattern=f"^{DIGEST}$")
    """Commit it only if the weights have this digest then."""


class ErrorInfo(BaseModel):
    """What was wrong, and with which field of the request."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorInfo


class OtherForm(BaseModel):
    """What the same question gets, after the turn, in a form that was not taught."""

    form: str
    """The same words as in `taught`."""
    prompt: Prompt
    after: str


class Answer(BaseModel):
    """What one edit did: the greedy answer to its prompt before and after the turn, white space as
    it stands; of a chat, the content that a user gets."""

    prompt: Prompt
    target: str
    before: str
    after: str
    succeeded: bool
    reason: str | None
    """Why it has not succeeded."""
    rounds: int
    taught: list[str]
    """The forms of prompt and rephrases: "text", "chat", "chat with a system prompt"."""
    other_forms: list[OtherForm]


class Unchanged(BaseModel):
    """The greedy answer to one locality prompt before and after the turn."""

    prompt: Prompt
    before: str
    after: str
    unchanged: bool


class Specificity(BaseModel):
    """What the turn did to the answers that were to stand."""

    score: float | None
    """Share of the locality prompts whose answer is unchanged; null without any."""
    prompts: list[Unchanged]


class Timings(BaseModel):
    """Milliseconds of a turn: waiting, side passes, solving, writing, requests held, in all."""

    queue_ms: float
    capture_ms: float
    solve_ms: float
    commit_ms: float
    pause_ms: float
    total_ms: float


class EditsAnswer(BaseModel):
    """What a turn did; of a dry run, what it would do."""

    version: int
    edits: list[Answer]
    specificity: Specificity
    timings: Timings
    rejected: str | None = None
    """Of a dry run: why a guard would reject the turn."""
    protected: float
    """Share of the model's own texts that the turn could hold still: below 1 while they are being
    gathered after the first start of a model, 0 if there were none yet."""


class CommitTimings(BaseModel):
    """Milliseconds of a rollback or of an applied delta."""

    queue_ms: float
    commit_ms: float
    pause_ms: float
    total_ms: float


class VersionAnswer(BaseModel):
    """The version that is served after a rollback or an applied delta."""

    version: int
    digest: str
    """SHA-256 of the edited weights, read back from where they are served; of a dry run, that they
    would have."""
    timings: CommitTimings
    before: str | None = None
    """Of a delta: digest of the version that it comes after."""
    rejected: str | None = None
    """Of a dry run: why a guard would reject the delta."""
    again: bool = False
    """Whether the delta was applied before, with its idempotency key, as this version."""


class Rank(BaseModel):
    """What one rank of one engine serves."""

    engine: int
    """0, or which of the data parallel ones."""
    rank: int
    version: int
    digest: str | None
    """SHA-256 of the edited weights; null where it was not asked for."""


class Change(BaseModel):
    """A change that is under way or waits."""

    kind: Literal["edit", "apply", "rollback"]
    edits: int
    dry_run: bool
    seconds: float
    """Since it was asked for."""


class Follows(BaseModel):
    """How a server that follows another one is doing."""

    leader: str
    """URL of the leader."""
    version: int | None
    """That the leader served when it was last heard of; null if it never was."""
    behind: int | None
    """Versions of the leader that are to be taken, and of this server that it has taken back."""
    seconds: float | None
    """Since the leader was last heard of."""
    error: str | None
    """Why the leader's version is not served; it is tried again."""


class Health(BaseModel):
    """Whether all ranks serve the same weights, and which."""

    status: Literal["ok", "diverged"]
    version: int
    digest: str | None = None
    """That the journal has for the version."""
    base: str | None = None
    """The digest of the untouched weights, version 0."""
    library_version: str = __version__
    follows: Follows | None = None
    """Of a server that takes the versions of a leader."""
    turn: bool
    """Whether a change is under way."""
    queue: list[Change]
    """The changes of the API server that answers: first the one under way, then those that wait."""
    traffic_keys: int
    """Keys of live traffic that are held still, per module."""
    gathered: float
    """Share of the model's own texts that are written, which edits are to leave alone."""
    ranks: list[Rank]

    @classmethod
    def of(
        cls,
        ranks: Sequence[Mapping[str, Any]],
        recorded: str | None,
        queue: Sequence[Mapping[str, Any]] = (),
        follows: Follows | None = None,
    ) -> Health:
        """Of the ranks' answers, the digest that the journal has for the first one's version if it
        is to be compared, the changes of this server, and how it follows its leader."""
        digests = {rank["digest"] for rank in ranks} | ({recorded} if recorded else set())
        same = len({rank["version"] for rank in ranks}) == 1 and len(digests) == 1
        same = same and not any(rank.get("foreign") for rank in ranks)
        return cls(
            status="ok" if same else "diverged",
            version=ranks[0]["version"],
            digest=ranks[0].get("recorded"),
            base=ranks[0].get("base"),
            follows=follows,
            turn=ranks[0]["turn"],
            queue=[Change(**change) for change in queue],
            traffic_keys=ranks[0]["traffic_keys"],
            gathered=ranks[0]["gathered"],
            ranks=[Rank(**{name: rank[name] for name in Rank.model_fields}) for rank in ranks],
        )


class Page(BaseModel):
    """Some of the journal's entries, newest first."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""
    from fastapi.responses import JSONResponse  # clients read this module too, without FastAPI

    kind, _ = ERRORS.get(status, ("Error", ""))
    error = {"message": message, "type": kind, "param": param, "code": status}
    headers = {"Retry-After": str(RETRY_SECONDS[status])} if status in RETRY_SECONDS else None
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first validation error as (message, param): what, got, expected."""
    error = errors[0]
    loc = [part for part in error["loc"][1:] if part not in ("text", "messages")]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")
    name = next((p for p in reversed(loc) if p in EXPECTED), "body")
    if loc and isinstance(loc[-1], int):
        name += "[]"
    param = path or None
    what = path or "the body"
    if error["type"] == "json_invalid":
        return f"the body is not JSON, expected {EXPECTED['body']}", None
    if error["type"] == "missing" and path:
        return f"{what} is missing, expected {EXPECTED[name]}; add it", param
    if error["type"] == "missing":
        return f"the body is empty, expected {EXPECTED['body']}", None
    if error["type"] == "extra_forbidden":
        return f"unknown parameter {what}; remove it or correct its spelling", param
    if isinstance(error.get("input"), (bytes, bytearray)):
        return f"the body was not sent as JSON, expected {EXPECTED['body']}", None
    if error["type"] == "value_error":
        return f"{what}: {error['ctx']['error']}", param
    return f"{what} is {_show(error.get('input'))}, expected {EXPECTED[name]}; correct it", param


def _show(value: Any) -> str:
    """A short, printable form of what was sent."""
    if isinstance(value, (list, dict)) and value:
        return f"a {'list' if isinstance(value, list) else 'JSON object'} of {len(value)}"
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
