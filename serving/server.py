"""The server: requests over HTTP to jobs of the worker, and pieces of text to answers of the protocol."""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .batches import End, Job, Worker
from .protocol import ChatRequest, Form, RequestError, event, read_request

MOST_REQUESTS = 128  # at once; each may hold an image's pixels
MOST_BODY = 32 * 2**20  # bytes of a request
MOST_BODIES = 256 * 2**20  # bytes of all requests that are being read
BODY_SECONDS = 60  # in which a request must have come


class Server:
    """The routes and what they share.

    Args:
        name: the model's name in requests.
        api_key: what a client must know; None to answer everybody.
        allow_urls: whether images may be fetched from public addresses.
    """

    def __init__(self, worker: Worker, name: str, api_key: str | None, allow_urls: bool):
        self.worker, self.name, self.api_key, self.allow_urls = worker, name, api_key, allow_urls
        self.max_images = worker.processor.image_processor.max_images
        self.requests = self.bytes = 0
        # Each of these threads may hold one whole image.
        self.preparing = ThreadPoolExecutor(max(1, min(4, torch.get_num_threads())), "images")

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/load_model", self.load_model, methods=["POST"]),
            ],
            exception_handlers={
                RequestError: lambda request, error: JSONResponse(error.body(), error.status),
                HTTPException: self.other_error,
                ClientDisconnect: lambda request, error: Response(status_code=499),  # nobody reads it
                Exception: self.own_error,
            },
            lifespan=self.life,
        )

    @contextlib.asynccontextmanager
    async def life(self, app: Starlette):
        yield
        await asyncio.to_thread(self.worker.close)
        self.preparing.shutdown(cancel_futures=True)

    async def other_error(self, request: Request, error: HTTPException) -> Response:
        """Of Starlette: an unknown address, or another method."""
        what = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(RequestError(what, status=error.status_code).body(), error.status_code)

    async def own_error(self, request: Request, error: Exception) -> Response:
        return JSONResponse(RequestError("The server failed; its log says why.", status=500).body(), 500)

    # --- Routes ---

    async def health(self, request: Request) -> Response:
        is_well = self.worker.thread.is_alive()
        return JSONResponse({"status": "ok" if is_well else "the model's thread has ended"}, 200 if is_well else 503)

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "pheye"}
        return JSONResponse({"object": "list", "data": [model]})

    async def load_model(self, request: Request) -> Response:
        """`transformers chat` asks its server for this before its first question."""
        self.check_key(request)
        return Response(event({"status": "ready", "model": self.name, "cached": True}), media_type="text/event-stream")

    async def chat(self, request: Request) -> Response:
        self.check_key(request)
        if self.requests >= MOST_REQUESTS:
            raise RequestError(
                f"{MOST_REQUESTS} requests are being answered; try again.", status=503, code="overloaded"
            )
        self.requests += 1
        answer = None
        try:
            read, job, pieces = await self.prepared(request)
            self.worker.put(job)
            answer = Answering(self, request, read, job, pieces)
            return answer if read.is_streamed else await answer.whole()
        finally:
            if answer is None or not read.is_streamed:
                self.requests -= 1

    def check_key(self, request: Request):
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # Starlette reads each byte of a header as a character.
        if self.api_key is not None and not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
            raise RequestError("Give the server's API key.", status=401, code="invalid_api_key")

    async def prepared(self, request: Request) -> tuple[ChatRequest, Job, asyncio.Queue]:
        """The request, its job, and the queue to which the job sends."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

        def send(piece: str | End):
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def prepare(body: bytearray) -> tuple[ChatRequest, Job]:
            read = read_request(body, self.name, self.allow_urls, self.max_images)
            return read, self.worker.prepare(read, send)

        body = bytearray()
        try:
            await self.read_body(request, body)
            read, job = await loop.run_in_executor(self.preparing, prepare, body)
        finally:
            self.bytes -= len(body)
        return read, job, pieces

    async def read_body(self, request: Request, body: bytearray):
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    self.bytes += len(piece)
                    if len(body) > MOST_BODY:
                        raise RequestError(
                            f"A request may have {MOST_BODY // 2**20} MB; reduce the image.", status=413
                        )
                    if self.bytes > MOST_BODIES:
                        raise RequestError("Too much is being sent at once; try again.", status=503, code="overloaded")
        except TimeoutError as error:
            raise RequestError(f"The request has not come within {BODY_SECONDS} s.", status=408) from error


class Answering(StreamingResponse):
    """An answer on its way to one client; when the client goes away, the job is abandoned."""

    def __init__(self, server: Server, request: Request, read: ChatRequest, job: Job, pieces: asyncio.Queue):
        super().__init__(self.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.server, self.request, self.read, self.job, self.pieces = server, request, read, job, pieces
        self.form = Form(server.name, len(job.ids))

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)  # it is cancelled when the client goes away
        finally:
            self.job.is_abandoned = True
            self.server.requests -= 1

    async def events(self) -> AsyncIterator[str]:
        yield event(self.form.chunk({"role": "assistant", "content": ""}))
        while isinstance(piece := await self.pieces.get(), str):
            yield event(self.form.chunk({"content": piece}))
        if piece.error is not None:
            yield event(as_request_error(piece.error).body())
            return
        yield event(self.form.chunk({}, piece.reason))
        if self.read.includes_usage:
            yield event(self.form.last_chunk(piece.tokens))
        yield event("[DONE]")

    async def whole(self) -> Response:
        """The answer in one piece."""
        answer, gone = asyncio.create_task(self.text_and_end()), asyncio.create_task(self.until_gone())
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=499)
            text, end = answer.result()
            if end.error is not None:
                raise as_request_error(end.error)
            return JSONResponse(self.form.whole(text, end.reason, end.tokens))
        finally:
            self.job.is_abandoned = True
            answer.cancel()
            gone.cancel()

    async def text_and_end(self) -> tuple[str, End]:
        text = ""
        while isinstance(piece := await self.pieces.get(), str):
            text += piece
        return text, piece

    async def until_gone(self):
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


def as_request_error(error: Exception) -> RequestError:
    """Other errors are the server's own, and say nothing to strangers."""
    if isinstance(error, RequestError):
        return error
    return RequestError("The model failed; the server's log says why.", status=500)
