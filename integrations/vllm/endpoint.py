"""The /v1/edits routes, on the model's own server and under its API key.

Loaded by vLLM as the endpoint plugin `ultraedit` where VLLM_PLUGINS names it. The work is done by
`EditService` and, next to the weights, by `UltraEditWorker`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMError
from vllm.logger import init_logger

from ultraedit_kernels.integrations.vllm.protocol import (
    EXPECTED,
    MAX_VERSION,
    EditError,
    EditsAnswer,
    EditsBody,
    ErrorBody,
    Page,
    RollbackBody,
    VersionAnswer,
    describe,
    error_response,
)
from ultraedit_kernels.integrations.vllm.service import EditService

logger = init_logger("vllm.ultraedit")

OCTETS = "application/octet-stream"


class UltraEditEndpoint:
    """vLLM endpoint plugin with the routes of this module."""

    name = "ultraedit"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Start the worker's side. Raises, so that the server does not start, if it refuses."""
        assert engine_client is not None  # only the render server, which lacks the task, has none
        service = EditService(engine_client, args.chat_template)
        await service.start()
        state.ultraedit = service


class _Route(APIRoute):
    """Every error in OpenAI's shape, and a body that does not validate is a 400."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return error_response(400, *describe(error.errors()))
            except HTTPException as error:
                # FastAPI's word for a body that is no text, or nested too deeply to be read.
                message = f"{error.detail}, expected {EXPECTED['body']}"
                return error_response(error.status_code, message)
            except EditError as error:
                return error_response(error.status, str(error), error.param)
            except VLLMError:
                raise  # vLLM has its own handler, which also stops a server without an engine
            except Exception as error:
                logger.exception("UltraEdit: %s %s failed", request.method, request.url.path)
                return error_response(500, f"{error}; the server's log has more")

        return handle_errors


router = APIRouter(
    prefix="/v1/edits",
    tags=["edits"],
    route_class=_Route,
    responses={code: {"model": ErrorBody} for code in (400, 404, 409, 500, 503)},
)
Version = Annotated[int, Path(ge=0, le=MAX_VERSION)]


def _service(request: Request) -> EditService:
    return request.app.state.ultraedit


@router.post("", response_model=EditsAnswer)
async def create(body: EditsBody, request: Request) -> dict[str, Any]:
    """Edit facts: one turn."""
    return await _service(request).edit_once(body)


@router.get("", response_model=Page)
async def index(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[int | None, Query(ge=1, le=MAX_VERSION)] = None,
) -> dict[str, Any]:
    """The journal, newest version first; for the next page send the last one as `before`."""
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
async def apply(request: Request) -> dict[str, Any]:
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
    return await service.run(service.apply(data))


@router.post("/rollback", response_model=VersionAnswer)
async def rollback(body: RollbackBody, request: Request) -> dict[str, Any]:
    """Go back to an earlier version; 0 is the untouched model."""
    service = _service(request)
    return await service.run(service.rollback(body.version))


@router.get("/{version}")
async def entry(version: Version, request: Request) -> dict[str, Any]:
    """The journal's entry of one version."""
    found = (await _service(request).history(1, version + 1))["entries"]
    if not found or found[0]["version"] != version:
        raise EditError(
            404, f"version {version} is not in the journal; GET /v1/edits lists it", "version"
        )
    return found[0]


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
