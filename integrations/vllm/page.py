"""The page for operators, GET /v1/edits/ui: files for a browser, which hold no data."""

from __future__ import annotations

from importlib.resources import files

from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ultraedit_kernels.integrations.vllm.keys import PREFIX, path_of
from ultraedit_kernels.integrations.vllm.protocol import error_response

PATH = f"{PREFIX}/ui"
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What the folder `ui` may hold; nothing else of it is served."""
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # no text ever becomes markup or code
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class PageFiles:
    """ASGI middleware around the keys' check: answers requests for the page's files by itself.

    A browser asks for a page without a key. So what is answered here goes no further: nothing
    behind the keys is within reach of a request that is let in because of its path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._files = {
            PATH if file.name == INDEX else f"{PATH}/{file.name}": (file.read_bytes(), kind)
            for file in files(__package__).joinpath("ui").iterdir()
            if (kind := TYPES.get(file.name[file.name.rfind(".") :])) is not None
        }

    @property
    def paths(self) -> list[str]:
        """All that is answered without a key."""
        return sorted(self._files)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a file of the page, or pass the request on."""
        path = path_of(scope)
        answer = self._app
        if path in self._files:
            answer = self._file(path, scope["method"])
        elif path == f"{PATH}/":  # the page's links are relative to the path without the slash
            answer = RedirectResponse("../ui", 308, HEADERS)
        await answer(scope, receive, send)

    def _file(self, path: str, method: str) -> Response:
        if method not in ("GET", "HEAD"):
            response: Response = error_response(
                405, f"the method is {method}, expected GET for {path}"
            )
            response.headers["Allow"] = "GET, HEAD"
            return response
        body, kind = self._files[path]
        size = {"Content-Length": str(len(body))}
        return Response(body if method == "GET" else b"", 200, HEADERS | size, kind)
