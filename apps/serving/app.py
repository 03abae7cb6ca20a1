"""Offers an engine as an ASGI application: OpenAI's chat completions, health and metrics."""

import contextlib
import secrets
from collections.abc import Callable

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from .door import Door
from .endpoint import Endpoint
from .engine import Engine
from .errors import ApiError
from .fetch import UrlPolicy
from .http import install_errors
from .limits import Limits
from .request import expect_model, request_schema


def create_app(
    engine: Engine,
    *,
    name: str,
    limits: Limits | None = None,
    policy: UrlPolicy | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """Returns the endpoint as an ASGI application, which closes the engine when it ends.

    Its `state.endpoint` is the `Endpoint`, whose `stop` and `give_up` the server calls.

    Args:
        engine, name, limits, policy: as for `Endpoint`.
        api_key: what clients must send as bearer token; None or "": nothing.
    """
    return app_of(Endpoint(engine, name, limits, policy), api_key)


def app_of(endpoint: Door, api_key: str | None = None) -> FastAPI:
    """Returns the application over an `Endpoint`, or over a `Relay` to those of replicas."""

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        endpoint.close()

    app = FastAPI(title="PerceptionDLM", lifespan=lifespan, redoc_url=None)
    app.state.endpoint = endpoint
    install_errors(app)
    app.include_router(_open_routes(endpoint))
    app.include_router(_model_routes(endpoint), dependencies=[Depends(_key_check(api_key))])
    return app


def _open_routes(endpoint: Door) -> APIRouter:
    """Returns the routes for those who watch the server, who need no key."""
    router = APIRouter()

    @router.get("/health")
    async def health():
        status = await endpoint.status()
        return JSONResponse(status, 200 if status["status"] == "ok" else 503)

    @router.get("/metrics")
    async def metrics():
        return Response(await endpoint.prometheus(), media_type=CONTENT_TYPE_LATEST)

    return router


def _model_routes(endpoint: Door) -> APIRouter:
    """Returns the routes that OpenAI's clients know."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models():
        return {"object": "list", "data": [endpoint.card()]}

    @router.get("/models/{wanted:path}")
    async def model(wanted: str):
        expect_model(endpoint.name, wanted)
        return endpoint.card()

    # The body is read by hand, within limits, so its schema is not known from the signature.
    body = {"required": True, "content": {"application/json": {"schema": request_schema()}}}

    @router.post("/chat/completions", openapi_extra={"requestBody": body})
    async def chat(request: Request):
        return await endpoint.chat(request)

    return router


def _key_check(api_key: str | None) -> Callable:
    async def expect_key(request: Request):
        given = request.headers.get("authorization", "").encode()
        if api_key and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            raise ApiError(
                401,
                "expected the right API key as bearer token",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return expect_key
