"""The routes of the server."""

import contextlib
import functools
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from retro.serve.config import Key, ServeConfig
from retro.serve.errors import ApiError, ErrorBody, add_error_handlers
from retro.serve.gate import Gate, StoppingError
from retro.serve.guard import Guard
from retro.serve.metrics import CONTENT_TYPE
from retro.serve.openai import Form
from retro.serve.schemas import (
    AddRequest,
    AskReply,
    AskRequest,
    ChangesReply,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    ModelList,
    ModelOut,
    ReloadReply,
    ReloadRequest,
    RemoveRequest,
    SearchReply,
    SearchRequest,
    State,
)
from retro.serve.service import Service, passages_out
from retro.serve.stream import EventStream, GoneError, timed, while_connected

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_REASONS: dict[int | str, str] = {
    400: "The request cannot be answered.",
    401: "A key is needed.",
    403: "The key does not allow this.",
    404: "There is no such thing.",
    408: "The request did not come in time.",
    413: "The request is too long.",
    429: "Too much is waiting; try again later.",
    503: "The server is being stopped, or not ready.",
    504: "It took too long.",
    "default": "Any other error.",
}
ERRORS = {status: {"model": ErrorBody, "description": reason} for status, reason in _REASONS.items()}
_METRICS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"description": "In its text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
}


def _described(reply: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Replies of a route that may also answer by server-sent events."""
    texts = {name: {"type": "string"} for name in ("event", "data")}
    event = {
        "type": "object",
        "properties": texts,
        "required": ["data"],
        "description": "Each one, where `stream` is true.",
    }
    return {**ERRORS, 200: {"model": reply, "content": {"text/event-stream": {"schema": event}}}}


def make_app(service: Service) -> FastAPI:
    """The application; it closes the service when it is shut down."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    config = service.config
    app = FastAPI(
        title="retro-lm",
        description="A language model that reads passages of an index: OpenAI's API, questions with sources, the live index.",
        version=_version(),
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # to an address that the client makes up in its Host header
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_exception_handler(GoneError, lambda _, __: Response(status_code=499))
    add_error_handlers(app, config.timeout_s)
    _add_openai_routes(app, service)
    _add_own_routes(app, service)
    _add_admin_routes(app, service)
    _add_state_routes(app, service)
    _add_page(app)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    hosts = None if service.keys.users else _own_names(config)
    app.add_middleware(Guard, max_body_bytes=config.max_body_bytes, metrics=service.metrics, hosts=hosts)
    return app


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("retro-lm")


def _own_names(config: ServeConfig) -> set[str]:
    host = config.host.lower()
    return {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}


# --- who asks -----------------------------------------------------------------------------------------------------

_bearer = HTTPBearer(auto_error=False, description="A key, where the server was started with keys.")
_admin_bearer = HTTPBearer(auto_error=False, scheme_name="AdminKey", description="The admin key.")
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
_AdminGiven = Annotated[HTTPAuthorizationCredentials | None, Depends(_admin_bearer)]
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def _user(request: Request, given: _Given) -> Key:
    service: Service = request.app.state.service
    key = service.keys.find(None if given is None else given.credentials)
    if key is None:
        raise ApiError(
            401, "a key is needed: send it as Authorization: Bearer KEY", code="invalid_api_key", headers=_CHALLENGE
        )
    return key


def _admin(request: Request, given: _AdminGiven) -> Key:
    service: Service = request.app.state.service
    if not service.keys.admins or service.library is None:
        raise ApiError(403, "this server has been started without an admin key: its index cannot be changed through it")
    key = None if given is None else service.keys.find(given.credentials)
    if key is None or (not key.is_admin and given is None):
        raise ApiError(
            401,
            "the admin key is needed: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers=_CHALLENGE,
        )
    if not key.is_admin:
        raise ApiError(403, "this key does not allow to change the index: the admin key does")
    return key


User = Annotated[Key, Depends(_user)]
Admin = Annotated[Key, Depends(_admin)]


# --- replies ------------------------------------------------------------------------------------------------------


async def _answered(
    service: Service, request: Request, gate: Gate | None, count: int, work: Callable[[], Any]
) -> Response:
    """A reply that is made as a whole, while the client is there and in time."""

    async def made() -> Any:
        if service.is_stopping:
            raise StoppingError("the server is being stopped")
        with contextlib.nullcontext() if gate is None else gate.admit(count):
            return await work()

    return JSONResponse(await while_connected(request, made(), service.config.timeout_s))


async def _streamed(
    service: Service, request: Request, count: int, begin: Callable[[], Coroutine[Any, Any, Any]], name: str | None
) -> Response:
    """A reply that is sent as it is made. What fails before it begins is an error like any other.

    Args:
        service: See Service.
        request: Of the client.
        count: Sequences.
        begin: Gives what has `events`.
        name: Of the event that tells of an error.
    """
    if service.is_stopping:
        raise StoppingError("the server is being stopped")
    inside = contextlib.ExitStack()
    inside.enter_context(service.decoding.admit(count))
    try:
        begun = await while_connected(request, begin(), service.config.timeout_s)
    except BaseException:
        inside.close()
        raise
    events = timed(begun.events(), service.config.timeout_s, name)
    return EventStream(events, timeout_s=service.config.timeout_s, at_end=inside.close)


# --- routes -------------------------------------------------------------------------------------------------------


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    def check_model(name: str) -> None:
        if name != service.config.model_name:
            raise ApiError(
                404,
                f"there is no model of this name: this server has {service.config.model_name}",
                code="model_not_found",
                param="model",
            )

    async def generated(request: Request, body: CompletionRequest | ChatRequest, key: Key, plan: Any) -> Response:
        check_model(body.model)
        if service.config.log_prompts:
            logger.info("%s", json.dumps(body.model_dump(include={"prompt", "messages"})))

        async def begin() -> Form:
            return Form(body, await plan(body, key), service)

        async def whole() -> Any:
            return await (await begin()).reply()

        prompts = body.prompt if isinstance(body, CompletionRequest) else ""
        many = isinstance(prompts, list) and not isinstance(prompts[0], int)
        count = (len(prompts) if many else 1) * (body.n or 1)
        if body.stream:
            return await _streamed(service, request, count, begin, None)
        return await _answered(service, request, service.decoding, count, whole)

    @app.post("/v1/completions", tags=["OpenAI"], responses=_described(CompletionReply))
    async def completions(request: Request, body: CompletionRequest, key: User) -> Response:
        """Continue a text; passages are looked up at every chunk border."""
        return await generated(request, body, key, service.plan_completion)

    @app.post("/v1/chat/completions", tags=["OpenAI"], responses=_described(ChatReply))
    async def chat_completions(request: Request, body: ChatRequest, key: User) -> Response:
        """Answer messages; passages are looked up for the last one of the user."""
        return await generated(request, body, key, service.plan_chat)

    def described() -> dict[str, Any]:
        library, config = service.library, service.config
        return {
            "id": config.model_name,
            "object": "model",
            "created": service.model.created,
            "owned_by": "retro-lm",
            "retro": {
                "retrieval": service.can_retrieve,
                "default_k": config.num_passages if service.can_retrieve else 0,
                "retrievers": service.methods,
                "documents": 0 if library is None else library.num_documents,
                "admin": bool(service.keys.admins) and library is not None,
                "max_k": config.max_passages,
                "max_tokens": config.max_tokens,
            },
        }

    @app.get("/v1/models", tags=["OpenAI"], response_model=ModelList, responses=ERRORS)
    async def models(_: User) -> Any:
        """The models of this server: one."""
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}", tags=["OpenAI"], response_model=ModelOut, responses=ERRORS)
    async def model(name: str, _: User) -> Any:
        """One model."""
        check_model(name)
        return described()


def _add_own_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/ask", tags=["RETRO"], responses=_described(AskReply))
    async def ask(request: Request, body: AskRequest, key: User) -> Response:
        """Answer a question from passages, and say from where the answer comes."""
        if service.config.log_prompts:
            logger.info("%s", json.dumps(body.question))
        begin = functools.partial(service.ask, body, key)
        if body.stream:
            return await _streamed(service, request, 1, begin, "error")

        async def whole() -> Any:
            return await (await begin()).reply()

        return await _answered(service, request, service.decoding, 1, whole)

    @app.post("/v1/search", tags=["RETRO"], responses={**ERRORS, 200: {"model": SearchReply}})
    async def search(request: Request, body: SearchRequest, key: User) -> Response:
        """Look passages up."""
        if service.config.log_prompts:
            logger.info("%s", json.dumps(body.query))

        async def whole() -> Any:
            wanted = service.search_of(body, key, service.config.num_passages, needs_model=False)
            if service.library is None:
                raise ApiError(404, "this server has been started without an index")
            return {"passages": passages_out(await service.passages(body.query, wanted))}

        return await _answered(service, request, None, 0, whole)


def _add_admin_routes(app: FastAPI, service: Service) -> None:
    # A change that has begun is finished, whether or not the client waits for it.
    async def changed(work: Callable[[], Any]) -> Any:
        if service.is_stopping:
            raise StoppingError("the server is being stopped")
        return await work()

    @app.post("/v1/documents", tags=["Index"], response_model=ChangesReply, responses=ERRORS)
    async def add_documents(body: AddRequest, _: Admin) -> Any:
        """Add documents to the index, or replace them; they are found as soon as this returns."""
        library = service.library
        assert library is not None
        if len(body.documents) > service.config.max_documents:
            raise ApiError(
                400,
                f"{len(body.documents)} documents: this server takes at most {service.config.max_documents} at once",
                param="documents",
            )
        records = [document.model_dump(exclude_none=True) for document in body.documents]
        done = await changed(lambda: library.add(records, corpus=body.corpus, update=body.update))
        return _changes(done, [f"{body.corpus}:{record['id']}" for record in records], library.num_documents)

    @app.delete("/v1/documents", tags=["Index"], response_model=ChangesReply, responses=ERRORS)
    async def remove_documents(body: RemoveRequest, _: Admin) -> Any:
        """Remove documents from the index; they are found no more as soon as this returns."""
        library = service.library
        assert library is not None
        if len(body.keys) > service.config.max_documents:
            raise ApiError(
                400,
                f"{len(body.keys)} keys: this server takes at most {service.config.max_documents} at once",
                param="keys",
            )
        done = await changed(lambda: library.remove(body.keys))
        return _changes(done, body.keys, library.num_documents)

    @app.post("/v1/admin/reload", tags=["Index"], response_model=ReloadReply, responses=ERRORS)
    async def reload(body: ReloadRequest, _: Admin) -> Any:
        """Open the index anew, or another one of those that the server was started with; no request fails by it."""
        library = service.library
        assert library is not None
        await changed(lambda: library.reload(body.index))
        return {"index": library.name, "documents": library.num_documents}


def _changes(done: Any, keys: list[str], documents: int) -> dict[str, Any]:
    counts = {name: getattr(done, name) for name in ("added", "updated", "removed", "unchanged")}
    return {**counts, "keys": keys, "documents": documents}


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get(
        "/healthz",
        tags=["State"],
        response_model=State,
        responses={500: {"model": State, "description": "It does not."}},
    )
    async def healthz() -> Response:
        """Whether the process works; if not, start it anew."""
        alive = service.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 500)

    @app.get(
        "/readyz", tags=["State"], response_model=State, responses={503: {"model": State, "description": "Not now."}}
    )
    async def readyz() -> Response:
        """Whether requests should be sent here."""
        ready = service.engine.is_alive and not service.is_stopping
        return JSONResponse({"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    @app.get("/metrics", tags=["State"], response_class=Response, responses=_METRICS)
    async def metrics(_: User) -> Response:
        """Counters and times for Prometheus."""
        return PlainTextResponse(service.metrics.exposition(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    """The files of the page, each a route of its own: no path of a request is ever looked for on the disk."""

    def add(route: str, path: Path) -> None:
        @app.get(route, include_in_schema=False)
        async def file() -> Response:
            return FileResponse(path, media_type=PAGE_TYPES[path.suffix], headers={"Cache-Control": "no-cache"})

    for path in sorted(PAGE.iterdir()) if PAGE.is_dir() else ():
        if path.suffix in PAGE_TYPES:
            add("/" if path.name == "index.html" else f"/{path.name}", path)
