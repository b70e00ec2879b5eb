"""Who may use /v1/edits: the edit keys if there are any, else the server's API keys."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from ultraedit_kernels.integrations.vllm import metrics
from ultraedit_kernels.integrations.vllm.protocol import error_response

PREFIX = "/v1/edits"
SCOPE = "ultraedit_key"
"""Where a request's scope has the id of the key that let it in."""
NO_KEY = "none"
"""Id of a request where no key is asked for."""


class EditKeys:
    """ASGI middleware around vLLM's own: lets a request to /v1/edits in, or answers 401 or 403.

    vLLM's check comes after, guards all of /v1 and knows only the API keys. What an edit key has
    let in goes on with an API key in its place.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [_digest(key) for key in keys or api_keys]
        self._api_keys = [_digest(key) for key in api_keys]
        self._inner = f"Bearer {api_keys[0]}" if api_keys else None
        self._wanted = "an edit key" if keys else "the server's API key"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if its key may, else answer 401 or 403."""
        path = path_of(scope)
        edits = path == PREFIX or path.startswith(f"{PREFIX}/")
        if edits and scope["method"] != "OPTIONS":
            scheme, _, key = Headers(scope=scope).get("Authorization", "").partition(" ")
            given = _digest(key.strip() if scheme.lower() == "bearer" else "")
            if self._keys and not _among(given, self._keys):
                return await self._refuse(given)(scope, receive, send)
            scope = {**scope, SCOPE: given.hex()[:8] if self._keys else NO_KEY}
            if self._inner is not None:
                scope["headers"] = list(scope["headers"])
                MutableHeaders(scope=scope)["Authorization"] = self._inner
        await self._app(scope, receive, send)

    def _refuse(self, given: bytes) -> ASGIApp:
        metrics.failed("unauthorized")
        if _among(given, self._api_keys):
            return error_response(
                403, "the server's API key may not edit, expected an edit key; send one of those"
            )
        got = "no key was sent" if given == _digest("") else "the key is not known"
        response = error_response(
            401, f'{got}, expected {self._wanted}; send it as "Authorization: Bearer KEY"'
        )
        response.headers["WWW-Authenticate"] = "Bearer"
        return response


def path_of(scope: Scope) -> str:
    """The path that a request asks for, as the routes have it; empty for what is no request."""
    if scope["type"] != "http":
        return ""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _among(given: bytes, known: Sequence[bytes]) -> bool:
    """Whether a digest is among others, in a time that does not depend on which."""
    return bool(sum(secrets.compare_digest(given, one) for one in known))
