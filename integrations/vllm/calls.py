"""The requests that a client makes, and what their answers mean; nothing is sent here."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from ultraedit_kernels._version import __version__
from ultraedit_kernels.integrations.vllm.protocol import (
    EditsAnswer,
    ErrorBody,
    ErrorInfo,
    Health,
    Page,
    RollbackBody,
    VersionAnswer,
)
from ultraedit_kernels.model.request import EditRequest
from ultraedit_kernels.store.delta import EditDelta

PREFIX = "/v1/edits"
OCTETS = {"Content-Type": "application/octet-stream"}
REMEDIES = {
    401: "give the server's edit key: Client(url, key), or $ULTRAEDIT_API_KEY",
    403: "give an edit key, which is another than the API key here",
    429: "send it again later, or batch edits into one request",
    503: "send it again when the server serves",
}
"""What to do, where the status alone says it."""

T = TypeVar("T")
Edits = EditRequest | Mapping[str, Any]
"""An edit, or a JSON object of one as the server takes it."""


class ServerError(ValueError):
    """A request that came to nothing. The text is the server's message with what to do.

    Attributes:
        url: of the server.
        message: the text without the URL.
        status: the HTTP status; None if no answer came, as from a server that is not there, and it
            is not known whether the request was served.
        param: the field of the request that is wrong, if one is.
        retry_after: seconds after which the same request may pass, if that is known.
    """

    def __init__(
        self,
        url: str,
        message: str,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{url}: {message}")
        self.url, self.message, self.status = url, message, status
        self.param, self.retry_after = param, retry_after


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request.

    Attributes:
        method, path: of it; the path is below the server's URL.
        returns: what a good answer's body is made into.
        good: statuses of good answers.
        request: further arguments of httpx's `request`.
        repeat: whether it may be sent again if no answer came.
    """

    method: str
    path: str
    returns: type[T]
    good: tuple[int, ...] = (200,)
    request: dict[str, Any] = field(default_factory=dict)
    repeat: bool = True

    def answer(self, url: str, status: int, headers: Mapping[str, str], body: bytes) -> T:
        """The answer of the server at a URL. Raises ServerError."""
        if status not in self.good:
            raise _refusal(url, self.path, status, headers, body)
        if self.returns is bytes:
            return body  # type: ignore[return-value]
        if status >= 400 and _error_of(body) is not None:  # it could not say how it is
            raise _refusal(url, self.path, status, headers, body)
        try:
            data = json.loads(body)
            if issubclass(self.returns, BaseModel):
                return self.returns.model_validate(data)
            return self.returns(data)  # type: ignore[call-arg]
        except (ValueError, TypeError, ValidationError) as error:
            raise ServerError(
                url,
                f"its answer is none that ultraedit-kernels {__version__} knows ({error}); use the "
                "same version here as on the server",
                status,
            ) from error


def _refusal(
    url: str, path: str, status: int, headers: Mapping[str, str], body: bytes
) -> ServerError:
    error = _error_of(body)
    if error is None:
        text = body.decode(errors="replace")[:200].strip()
        remedy = REMEDIES.get(status, "start it with `ultraedit serve`, or correct the URL")
        message = f"it answered {path} with {status} ({text}) and takes no edits; {remedy}"
        return ServerError(url, message, status)
    message, after = error.message, headers.get("Retry-After", "")
    if status in REMEDIES:
        message += f"; {REMEDIES[status]}"
    return ServerError(
        url, message, status, error.param, float(after) if after.isdecimal() else None
    )


def _error_of(body: bytes) -> ErrorInfo | None:
    try:
        return ErrorBody.model_validate_json(body).error
    except ValidationError:
        return None


def edit(
    edits: Edits | Sequence[Edits], dry_run: bool, idempotency_key: str | None
) -> Call[EditsAnswer]:
    """`POST /v1/edits`; without a key it gets one of its own, so that it may be repeated."""
    several = [edits] if isinstance(edits, (EditRequest, Mapping)) else edits
    body: dict[str, Any] = {"edits": [_edit(one) for one in several], "dry_run": dry_run}
    if not dry_run:
        body["idempotency_key"] = idempotency_key or uuid.uuid4().hex
    return Call("POST", PREFIX, EditsAnswer, request={"json": body})


def _edit(edit: Edits) -> dict[str, Any]:
    if not isinstance(edit, EditRequest):
        return dict(edit)
    return {
        "prompt": edit.prompt,
        "target": edit.target,
        "rephrases": list(edit.rephrases),
        "locality": list(edit.locality),
        "space": edit.space,
    }


def apply(
    delta: EditDelta | bytes | str | Path,
    dry_run: bool,
    idempotency_key: str | None,
    serving: str | None,
) -> Call[VersionAnswer]:
    """`POST /v1/edits/apply`, of a delta or its file. Raises OSError if there is none."""
    if isinstance(delta, EditDelta):
        delta = delta.to_bytes()
    elif not isinstance(delta, bytes):
        delta = Path(delta).read_bytes()
    given = {"idempotency_key": idempotency_key, "serving": serving}
    params = {name: value for name, value in given.items() if value is not None}
    if dry_run:
        params["dry_run"] = "true"
    request = {"content": delta, "headers": OCTETS, "params": params}
    repeat = dry_run or bool(idempotency_key or serving)
    return Call("POST", f"{PREFIX}/apply", VersionAnswer, request=request, repeat=repeat)


def rollback(version: int, serving: str | None) -> Call[VersionAnswer]:
    """`POST /v1/edits/rollback`."""
    body = RollbackBody(version=version, serving=serving).model_dump(exclude_none=True)
    return Call("POST", f"{PREFIX}/rollback", VersionAnswer, request={"json": body})


def history(limit: int, before: int | None) -> Call[Page]:
    """`GET /v1/edits`."""
    params = {"limit": limit} | ({} if before is None else {"before": before})
    return Call("GET", PREFIX, Page, request={"params": params})


def version(number: int) -> Call[dict[str, Any]]:
    """`GET /v1/edits/{version}`."""
    return Call("GET", f"{PREFIX}/{number}", dict)


def delta(number: int) -> Call[bytes]:
    """`GET /v1/edits/{version}/delta`."""
    return Call("GET", f"{PREFIX}/{number}/delta", bytes)


def health(digest: bool) -> Call[Health]:
    """`GET /v1/edits/health`; ranks that differ are an answer too."""
    params = {"digest": "true"} if digest else {}
    return Call("GET", f"{PREFIX}/health", Health, good=(200, 503), request={"params": params})
