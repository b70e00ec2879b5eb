"""The /v1/edits routes, on the model's own server and under its keys.

Loaded by vLLM as the endpoint plugin `ultraedit` where VLLM_PLUGINS names it. The work is done by
`EditService` and, next to the weights, by `EngineSide`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import uuid
from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMError
from vllm.logger import init_logger

from ultraedit_kernels.integrations.vllm import keys, metrics
from ultraedit_kernels.integrations.vllm.audit import Audit
from ultraedit_kernels.integrations.vllm.follow import Follower, Leader
from ultraedit_kernels.integrations.vllm.gathering import gather
from ultraedit_kernels.integrations.vllm.page import PageFiles
from ultraedit_kernels.integrations.vllm.protocol import (
    ERRORS,
    EXPECTED,
    MAX_VERSION,
    ApplyQuery,
    EditError,
    EditsAnswer,
    EditsBody,
    ErrorBody,
    Health,
    Page,
    RollbackBody,
    VersionAnswer,
    describe,
    error_response,
)
from ultraedit_kernels.integrations.vllm.service import EditService
from ultraedit_kernels.integrations.vllm.settings import (
    LEADER_KEY_VARIABLE,
    edit_keys,
    require_key,
)
from ultraedit_kernels.settings import RouteSettings, check, only

logger = init_logger("vllm.ultraedit")

OCTETS = "application/octet-stream"
MIB = 2**20


class UltraEditEndpoint:
    """vLLM endpoint plugin with the routes of this module."""

    name = "ultraedit"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes of this module to the server."""
        app.include_router(router)
        self._app = app

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Start the worker's side. Raises, so that the server does not start, if it refuses."""
        assert engine_client is not None  # only the render server, which lacks the task, has none
        section = engine_client.vllm_config.additional_config.get("ultraedit", {})
        check(section, "operator")
        settings = RouteSettings(**only(section, RouteSettings))
        api_keys = [key for key in args.api_key or [envs.VLLM_API_KEY] if key]
        own_keys = edit_keys(os.environ)
        require_key(own_keys or api_keys, settings.without_key)
        # Around all of vLLM's; `add_middleware` is refused, since vLLM has built the stack already.
        inner = self._app.middleware_stack or self._app.build_middleware_stack()
        self._app.middleware_stack = PageFiles(keys.EditKeys(inner, own_keys, api_keys))
        state.ultraedit_settings = settings
        state.ultraedit_audit = Audit(section.get("state_dir"), settings.audit_prompts)

        service = EditService(engine_client, state.online_renderer)
        await service.start()
        state.ultraedit = service
        metrics.serving((await service.status(False))[0]["version"])
        self._gathering = asyncio.create_task(gather(service.engines.leader, metrics.gathered))
        state.ultraedit_follower = None
        if settings.follow is not None:
            key = os.environ.get(LEADER_KEY_VARIABLE) or next(iter([*own_keys, *api_keys]), None)
            follower = Follower(service, Leader(settings.follow, key), state.ultraedit_audit)
            await follower.catch_up()  # before anybody is answered
            state.ultraedit_follower = follower
            self._following = asyncio.create_task(follower.run())


class _Route(APIRoute):
    """Every error in OpenAI's shape, and a body that does not validate is a 400."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in self.methods:
            return await super().handle(scope, receive, send)
        await _wrong_method(scope["method"], self.path)(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            if keys.SCOPE not in request.scope:  # the middleware read another path than the router
                raise EditError(401, "no key was checked for this path; write it in plain letters")
            settings: RouteSettings = request.app.state.ultraedit_settings
            delta = self.path == f"{keys.PREFIX}/apply"
            await _read(request, settings.max_delta_mib if delta else settings.max_body_mib)
            return await handle(request)

        async def handle_errors(request: Request) -> Response:
            name = request.headers.get("X-Request-Id", "")
            request.state.id = name if re.fullmatch(r"[!-~]{1,128}", name) else uuid.uuid4().hex
            try:
                response = await answer(request)
            except VLLMError:
                metrics.failed("engine")
                raise  # vLLM has its own handler, which also stops a server without an engine
            except Exception as error:
                status, message, param = _explain(error, request)
                metrics.failed(error.reason if isinstance(error, EditError) else ERRORS[status][1])
                response = error_response(status, message, param)
            response.headers["X-Request-Id"] = request.state.id
            return response

        return handle_errors


async def _read(request: Request, mib: int) -> None:
    """Read the body. Raises EditError 413 as soon as it is known to be larger than `mib` MiB."""
    size, body = request.headers.get("Content-Length", ""), bytearray()
    too_large = size.isdecimal() and int(size) > mib * MIB
    if not too_large:
        async for part in request.stream():
            body += part
            if too_large := len(body) > mib * MIB:
                break
    if too_large:
        raise EditError(413, f"the body is larger than {mib} MiB; send it in parts")
    request._body = bytes(body)  # where FastAPI finds it


def _check_size(body: EditsBody, settings: RouteSettings) -> None:
    if len(body.edits) > settings.max_edits:
        raise EditError(
            400,
            f"edits is a list of {len(body.edits)}, expected at most {settings.max_edits}; send "
            "the others in another request",
            "edits",
        )
    for i, edit in enumerate(body.edits):
        count = 1 + len(edit.rephrases) + len(edit.locality)
        if count > settings.max_prompts:
            raise EditError(
                400,
                f"edits[{i}] has {count} prompts with its rephrases and locality prompts, expected "
                f"at most {settings.max_prompts}; leave some out",
                f"edits[{i}]",
            )


def _explain(error: Exception, request: Request) -> tuple[int, str, str | None]:
    """Status, message and param of an error's answer."""
    match error:
        case RequestValidationError():
            return 400, *describe(error.errors())
        case EditError():
            return error.status, str(error), error.param
        case HTTPException():  # FastAPI's word for a body that is no text, or nested too deeply
            return 400, f"{error.detail}, expected {EXPECTED['body']}", None
        case ClientDisconnect():
            return 400, "the client went away before it had sent the body", None
    logger.exception("UltraEdit: %s %s failed", request.method, request.url.path)
    return 500, f"{error}; the server's log has more", None


def _wrong_method(method: str, path: str) -> Response:
    routes = [route for route in router.routes if isinstance(route, APIRoute)]
    allowed = sorted(
        {m for r in routes if r.path == path and r.include_in_schema for m in r.methods}
    )
    expected = " or ".join(allowed)
    response = error_response(405, f"the method is {method}, expected {expected} for {path}")
    response.headers["Allow"] = ", ".join(allowed)
    return response


router = APIRouter(
    prefix=keys.PREFIX,
    tags=["edits"],
    route_class=_Route,
    responses={
        code: {"model": ErrorBody}
        for code in (400, 401, 403, 404, 409, 413, 422, 429, 500, 501, 503)
    },
)
Version = Annotated[int, Path(ge=0, le=MAX_VERSION)]


def _service(request: Request) -> EditService:
    return request.app.state.ultraedit


async def _record(service: EditService, version: int) -> dict[str, Any] | None:
    """The journal's entry of a version."""
    found = (await service.history(1, version + 1))["entries"]
    return found[0] if found and found[0]["version"] == version else None


async def _change(
    request: Request, kind: str, asked: dict[str, Any], work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """Do the work, count it and write its audit line, even if the client goes away meanwhile."""
    audit: Audit = request.app.state.ultraedit_audit
    service = _service(request)
    who = {"kind": kind, "key": request.scope[keys.SCOPE], "request_id": request.state.id}

    async def recorded() -> dict[str, Any]:
        try:
            if (follower := request.app.state.ultraedit_follower) is not None:
                work.close()
                raise follower.refusal()
            with metrics.queued():
                answer = await work
        except Exception as error:
            status = error.status if isinstance(error, EditError) else 500
            outcome = "refused" if status < 500 else "failed"
            metrics.changed(kind, outcome)
            await audit.write(outcome, who | {"status": status, "error": str(error)} | asked)
            raise
        if answer.get("again"):  # the answer of an earlier request with its idempotency key
            metrics.changed(kind, "repeated")
            return answer
        if asked.get("dry_run"):
            metrics.changed(kind, "dry_run", answer)
            return answer
        metrics.changed(kind, "committed", answer)
        version = answer["version"]
        result = {"version": version, "digest": answer.get("digest")}
        if "edits" in answer:
            result["succeeded"] = sum(edit["succeeded"] for edit in answer["edits"])
            try:
                record = await _record(service, version)
                result["digest"] = record and record["digest"]
            except Exception:  # the edits are made, whatever their audit line lacks
                logger.exception("UltraEdit: the record of version %d was not read", version)
        await audit.write("committed", who | result | asked)
        return answer

    return await service.run(recorded())


@router.post("", response_model=EditsAnswer)
async def create(body: EditsBody, request: Request) -> dict[str, Any]:
    """Edit facts: one turn."""
    state = request.app.state
    _check_size(body, state.ultraedit_settings)
    asked = {"dry_run": body.dry_run} | state.ultraedit_audit.edits(body)
    return await _change(request, "edit", asked, state.ultraedit.edit_once(body))


@router.get("", response_model=Page)
async def index(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[int | None, Query(ge=1, le=MAX_VERSION)] = None,
) -> dict[str, Any]:
    """The journal, newest version first; for the next page send the last one as `before`.

    Beside its record each has `answers`: what the engine said before and after, if that is known.
    """
    page = await _service(request).history(limit, before)
    return {"object": "list", "data": page["entries"], "has_more": page["has_more"]}


@router.post(
    "/apply",
    response_model=VersionAnswer,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def apply(request: Request, asked: Annotated[ApplyQuery, Query()]) -> dict[str, Any]:
    """Apply a delta file; the body is the file."""
    service = _service(request)
    data = await request.body()
    form = request.headers.get("Content-Type", "").startswith("multipart/")
    if form or not data:
        raise EditError(
            400,
            f"the body is {'a form' if form else 'empty'}, expected a delta file and nothing else; "
            "send it as curl does with --data-binary @FILE",
        )
    noted: dict[str, Any] = {"delta_sha256": hashlib.sha256(data).hexdigest()}
    noted |= {"dry_run": True} if asked.dry_run else {}
    return await _change(request, "apply", noted, service.apply(data, asked))


@router.post("/rollback", response_model=VersionAnswer)
async def rollback(body: RollbackBody, request: Request) -> dict[str, Any]:
    """Go back to an earlier version; 0 is the untouched model."""
    service = _service(request)
    work = service.rollback(body.version, body.serving)
    return await _change(request, "rollback", {"to": body.version}, work)


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(request: Request, digest: bool = False) -> Response:
    """What every rank serves; 503 if they do not serve the same, which is the journal's version.

    Without `digest` only versions are compared; with it the weights are read, between two steps.
    """
    service = _service(request)
    ranks = await service.status(digest)
    recorded = ranks[0]["recorded"] if digest and ranks[0]["version"] else None
    follower: Follower | None = request.app.state.ultraedit_follower
    follows = None if follower is None else follower.state()
    found = Health.of(ranks, recorded, service.changes(), follows)
    return JSONResponse(found.model_dump(), 200 if found.status == "ok" else 503)


@router.get("/apply", include_in_schema=False)
@router.get("/rollback", include_in_schema=False)
async def not_to_be_read(request: Request) -> Response:
    """These are no versions, as which `GET /{version}` would take them."""
    return _wrong_method("GET", request.url.path)


@router.get("/{version}")
async def entry(version: Version, request: Request) -> dict[str, Any]:
    """The journal's entry of one version."""
    found = await _record(_service(request), version)
    if found is None:
        raise EditError(
            404, f"version {version} is not in the journal; GET /v1/edits lists it", "version"
        )
    return found


@router.get(
    "/{version}/delta",
    response_class=Response,
    responses={200: {"content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def delta(version: Version, request: Request) -> Response:
    """The version's delta as a safetensors file."""
    data = await _service(request).delta(version)
    name = f"ultraedit-{version:06d}.safetensors"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type=OCTETS, headers=headers)
