"""A judge server on loopback that does what it is told, and keeps account of every request.

Imports nothing of pvcore. A reply says what to send for one request; a script maps a prompt and the
number of times it was asked before to a reply.
"""

from __future__ import annotations

import json
import math
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Candidates = Sequence[tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What goes over the wire for one request.

    `end`: `whole` sends it all, `cut` promises more bytes than it sends, `chunk_cut` breaks off a
    chunked body, `half_head` breaks off the head, `none` closes without a word, `hang` says nothing
    until the server stops.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    end: Literal["whole", "cut", "chunk_cut", "half_head", "none", "hang"] = "whole"


def completion(
    text: Any = "50",
    *,
    tokens: Sequence[Any] | None = None,
    top: Candidates | None = None,
    finish: str = "stop",
    **changes: Any,
) -> Reply:
    """A well-formed completion, by default a sure number; `changes` replace parts of the choice."""
    candidates = [(text, math.log(0.9)), ("10", math.log(0.05))] if top is None else top
    entries = [{"token": t, "logprob": -0.1} for t in ([text] if tokens is None else tokens)]
    if entries:
        entries[0]["top_logprobs"] = [{"token": t, "logprob": p} for t, p in candidates]
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": entries},
    }
    return Reply(body=body(choices=[choice | changes]))


def body(**changes: Any) -> bytes:
    whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}
    return json.dumps(whole | changes).encode()


def error(status: int, *, code: str | None = None, **headers: str) -> Reply:
    content = {"error": {"message": "told to fail", "type": "scripted", "code": code}}
    kind = {"Content-Type": "application/json"}
    return Reply(status=status, body=json.dumps(content).encode(), headers=kind | headers)


Script = Callable[[str, int], Reply]


class Server:
    """Counts requests by prompt, and how many were under way at once."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()  # replies that left whole: what one pays for
        self.questions: list[dict[str, Any]] = []
        self.most_at_once = 0
        self.after: Callable[[str], None] = lambda prompt: None
        self._at_once = 0
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def n_requests(self) -> int:
        return sum(self.requests.values())

    def choose(self, question: dict[str, Any]) -> tuple[str, Reply]:
        prompt = question["messages"][-1]["content"]
        with self._lock:
            self.questions.append(question)
            before = self.requests[prompt]
            self.requests[prompt] += 1
        return prompt, self.script(prompt, before)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def paid(self, prompt: str) -> None:
        with self._lock:
            self.sent[prompt] += 1

    @contextmanager
    def running(self) -> Iterator[Server]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            self._http.shutdown()
            thread.join()
            self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the server."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 5

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.counted():
                prompt, reply = server.choose(question)
                self._say(prompt, reply)
            server.after(prompt)

        def do_GET(self) -> None:
            self.send_error(405)

        def _say(self, prompt: str, reply: Reply) -> None:
            if reply.end == "hang":
                server.stopping.wait()
            if reply.end in ("hang", "none"):
                return self._hang_up()
            if reply.end == "half_head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
                return self._hang_up()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.end == "chunk_cut":
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(reply.body) + reply.body[: len(reply.body) // 2])
                return self._hang_up()
            missing = 1000 if reply.end == "cut" else 0
            self.send_header("Content-Length", str(len(reply.body) + missing))
            self.end_headers()
            self.wfile.write(reply.body)
            if missing:
                return self._hang_up()
            server.paid(prompt)
            return None

        def _hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, format: str, *args: Any) -> None:
            """Tests print nothing."""

    return Handler
