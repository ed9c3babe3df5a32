"""A proxy between S3 clients and a real S3 server, which loses, delays, cuts and refuses what it is told to.

It answers 403 to whatever deletes or copies, and counts it: raycnn needs to list, read and write only.
Signatures hold because the Host header, which is signed, goes on as the client has sent it.
"""

import hashlib
import os
import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from raycnn.storage.aws import Account, Keys

PIECE = 256 * 1024
CODES = {
    400: "ExpiredToken",
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}

Fault = int | Literal["reset", "delay", "cut", "unanswered", "unconditional"]
"""What goes wrong with a request:

a status         it is not forwarded but answered so
"reset"          it is not forwarded, and the connection is reset
"delay"          it waits; other rules may hold for it, too
"cut"            of a PUT half the body goes on before both connections are reset, of others half the answer comes back
"unanswered"     the server does it, and the client's connection is reset
"unconditional"  a PUT without its If-None-Match, as a store that does not know the header would do it
"""

Stage = Literal["request", "half", "stored", "answered"]
"""A moment within a request: its headers are read and nothing is forwarded; half its body is; the server has
answered and the client does not know; the client has the answer."""


@dataclass(frozen=True)
class Rule:
    """Which requests meet a fault: from the nth that matches, at most `times` of them, each with the probability."""

    fault: Fault
    method: str | None = None
    """GET, HEAD, LIST, PUT, POST; None for any."""
    key: str = ""
    """A regular expression that is searched for in the key, or in the prefix of a LIST."""
    nth: int = 1
    times: int | None = None
    probability: float = 1.0
    seconds: float = 1.0
    """Of a delay."""


class Seen(NamedTuple):
    """A request, and what became of it."""

    method: str
    key: str
    done: str
    """"passed", "refused", "killed at <stage>", or the fault."""
    status: int
    """As the client was answered; 0: it was not."""


class FaultProxy:
    """A context in which a proxy listens at `endpoint`; same seed, rules and requests of each key: same faults."""

    def __init__(self, upstream: str, seed: int = 0, rules: tuple[Rule, ...] = ()) -> None:
        """Forward to the endpoint `upstream`, which may be set anew when the server has moved."""
        self.upstream, self.seed = upstream, seed
        self.requests: list[Seen] = []
        self._rules, self._hooks = rules, list[_Hook]()
        self._matched, self._fired, self._asked = Counter[int](), Counter[int](), Counter[tuple[int, str, str]]()
        self._lock = threading.Lock()
        self._open = set[_Peer]()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """May be set at any time, which starts all counts anew and forgets the requests so far."""
        return self._rules

    @rules.setter
    def rules(self, rules: tuple[Rule, ...]) -> None:
        with self._lock:
            self._rules = rules
            self.requests = []
            for counts in (self._matched, self._fired, self._asked):
                counts.clear()

    @property
    def refused(self) -> int:
        """How often somebody wanted to delete or to copy."""
        return sum(seen.done == "refused" for seen in self.requests)

    def on(self, method: str, key: str, stage: Stage, callback: Callable[[int], None], nth: int | None = 1) -> None:
        """Call back with the client's port when the nth matching request comes to the stage; None: each time.

        The request waits for the callback. If the client is gone then, the request is lost, and its body, of which
        the rest has come already, too.
        """
        with self._lock:
            self._hooks.append(_Hook(method, re.compile(key), stage, callback, nth))

    def off(self, callback: Callable[[int], None]) -> None:
        """Call this one no more."""
        with self._lock:
            self._hooks = [hook for hook in self._hooks if hook.callback != callback]

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="fault-proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # close alone does not wake accept
        self._listener.close()
        self._thread.join()
        with self._lock:
            for peer in self._open:
                peer.hang_up()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(_Peer(sock),), daemon=True).start()

    def _serve(self, client: "_Peer") -> None:
        exchange = _Exchange(self, client)
        with self._lock:
            self._open.add(client)
        try:
            while exchange.next():
                pass
        except OSError:
            client.reset()
        finally:
            with self._lock:
                self._open.discard(client)
            exchange.close()

    def decide(self, request: "_Request") -> list[Rule]:
        """The rules that hold for the request: delays, and at most one other."""
        chosen: list[Rule] = []
        with self._lock:
            for i, rule in enumerate(self._rules):
                if rule.method not in {None, request.method} or not re.search(rule.key, request.key):
                    continue
                self._matched[i] += 1
                self._asked[i, request.method, request.key] += 1
                spent = rule.times is not None and self._fired[i] >= rule.times
                if self._matched[i] < rule.nth or spent or self._draw(i, request) >= rule.probability:
                    continue
                if rule.fault == "delay" or all(other.fault == "delay" for other in chosen):
                    self._fired[i] += 1
                    chosen.append(rule)
        return chosen

    def _draw(self, rule: int, request: "_Request") -> float:
        """In [0, 1); it does not depend on how requests for different keys interleave."""
        asked = self._asked[rule, request.method, request.key]
        name = repr((self.seed, rule, request.method, request.key, asked))
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48

    def reached(self, request: "_Request", stage: Stage, client: "_Peer") -> None:
        """Run who waits for this moment; a client that did not survive it is a lost connection."""
        with self._lock:
            waiting = [hook for hook in self._hooks if hook.is_due(request, stage)]
        for hook in waiting:
            hook.callback(client.port)
        if waiting and client.gone():
            self.note(request, f"killed at {stage}", 0)
            raise ConnectionResetError

    def note(self, request: "_Request", done: str, status: int) -> None:
        """Log what became of a request."""
        with self._lock:
            self.requests.append(Seen(request.method, request.key, done, status))


@dataclass
class _Hook:
    method: str
    key: re.Pattern[str]
    stage: Stage
    callback: Callable[[int], None]
    nth: int | None

    def is_due(self, request: "_Request", stage: Stage) -> bool:
        if (stage, request.method) != (self.stage, self.method) or not self.key.search(request.key):
            return False
        if self.nth is None:
            return True
        self.nth -= 1
        return self.nth == 0


class _Peer:
    """One end of a connection, buffered."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = sock.getpeername()[1]
        self.send = sock.sendall
        self._sock, self._held = sock, b""

    def until(self, mark: bytes) -> bytes:
        """What comes up to and with the mark; b'' where the connection ends before it."""
        while mark not in self._held:
            if not (more := self._sock.recv(PIECE)):
                return b""
            self._held += more
        found, _, self._held = self._held.partition(mark)
        return found + mark

    def some(self, length: int = PIECE) -> bytes:
        """At least one byte, at most `length`; b'' at the end of the connection."""
        if not self._held:
            return self._sock.recv(min(length, PIECE))
        found, self._held = self._held[:length], self._held[length:]
        return found

    def exactly(self, length: int) -> Iterator[bytes]:
        """`length` bytes, piece by piece."""
        while length:
            if not (piece := self.some(length)):
                raise ConnectionResetError
            length -= len(piece)
            yield piece

    def chunks(self) -> Iterator[bytes]:
        """A chunked body as it stands, piece by piece."""
        while True:
            line = self.until(b"\r\n")
            size = int(line.split(b";")[0], 16)
            yield line
            yield from self.exactly(size + 2)
            if size == 0:
                return

    def gone(self) -> bool:
        """Whether the other side has closed, even if more of what it sent is still to be read."""
        waiting = select.poll()
        waiting.register(self._sock, getattr(select, "POLLRDHUP", select.POLLHUP))
        return bool(waiting.poll(0))

    def reset(self) -> None:
        """Close at once, with a TCP reset."""
        with suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def hang_up(self) -> None:
        """Wake whoever reads."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class _Request:
    """The head of a request; `method` is LIST for a GET of a bucket, whose `key` is the prefix."""

    def __init__(self, head: bytes) -> None:
        self.head = re.sub(rb"(?im)^expect:[^\n]*\n", b"", head)
        self.expects = self.head != head
        self.verb, target, _ = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
        where = urlsplit(target)
        self.query = dict(parse_qsl(where.query, keep_blank_values=True))
        self.bucket, _, key = unquote(where.path).lstrip("/").partition("/")
        is_list = self.verb == "GET" and not key
        self.method = "LIST" if is_list else self.verb
        self.key = self.query.get("prefix", "") if is_list else key

    @property
    def is_forbidden(self) -> bool:
        """Whether it deletes or copies."""
        is_delete = self.verb == "DELETE" or (self.verb == "POST" and "delete" in self.query)
        return is_delete or _field(self.head, "x-amz-copy-source") is not None


def _field(head: bytes, name: str) -> str | None:
    """A header's value."""
    found = re.search(rb"(?im)^" + name.encode() + rb":[ \t]*([^\r\n]*)", head)
    return found[1].decode("latin-1").strip() if found else None


def _body(peer: _Peer, head: bytes) -> tuple[int, Iterator[bytes]]:
    """(length, pieces) of the body that follows a head; the length of a chunked one is unknown and taken as 2."""
    if "chunked" in (_field(head, "transfer-encoding") or ""):
        return 2, peer.chunks()
    length = int(_field(head, "content-length") or 0)
    return length, peer.exactly(length)


def _halves(length: int, pieces: Iterator[bytes]) -> tuple[Iterator[bytes], Iterator[bytes]]:
    """The body in two; the first half is to be used up first."""
    over = b""

    def first() -> Iterator[bytes]:
        nonlocal over
        left = length // 2
        while left > 0 and (piece := next(pieces, None)) is not None:
            over, piece = piece[left:], piece[:left]
            left -= len(piece)
            yield piece

    def second() -> Iterator[bytes]:
        if over:
            yield over
        yield from pieces

    return first(), second()


class _Exchange:
    """The requests of one client connection, and the connection to the server that serves them."""

    def __init__(self, proxy: FaultProxy, client: _Peer) -> None:
        self._proxy, self._client = proxy, client
        self._server: _Peer | None = None
        self._address = ""

    def next(self) -> bool:
        """Serve one request; whether another may follow."""
        head = self._client.until(b"\r\n\r\n")
        if not head:
            return False
        request = _Request(head)
        if request.expects:
            self._client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.is_forbidden:
            self._answer(request, 403, "refused")
            return True
        *delays, fault = [*self._proxy.decide(request), None]
        if delays and delays[-1].fault != "delay":
            fault = delays.pop().fault
        time.sleep(sum(rule.seconds for rule in delays))
        self._proxy.reached(request, "request", self._client)
        return self._meet(request, fault, "delay" if delays else "passed")

    def _meet(self, request: _Request, fault: Fault | None, otherwise: str) -> bool:
        done = otherwise if fault is None else str(fault)
        if isinstance(fault, int):
            self._answer(request, fault, done)
            return True
        if fault == "reset":
            self._lose(request, done)
        if fault == "unconditional" and request.verb == "PUT":
            self._overwrite(request, done)
            return True
        self._forward(request, is_cut=fault == "cut" and request.verb == "PUT")
        return self._relay(request, fault, done)

    def _lose(self, request: _Request, done: str) -> None:
        self._proxy.note(request, done, 0)
        raise ConnectionResetError

    def _answer(self, request: _Request, status: int, done: str) -> None:
        for _ in _body(self._client, request.head)[1]:
            pass
        code = CODES[status]
        body = (
            b"" if request.verb == "HEAD" else f"<Error><Code>{code}</Code><Message>planned</Message></Error>".encode()
        )
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self._proxy.note(request, done, status)
        self._client.send(head.encode() + body)

    def _overwrite(self, request: _Request, done: str) -> None:
        """Put without the condition; a header that is signed cannot just be left out."""
        body = b"".join(_body(self._client, request.head)[1])
        keys = Keys(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], None)
        account = Account(self._proxy.upstream, "us-east-1", lambda: keys)
        answer = account.request("PUT", request.bucket, request.key, body=body)
        self._proxy.note(request, done, answer.status)
        head = f"HTTP/1.1 {answer.status} OK\r\nETag: {answer.headers.get('ETag', '')}\r\nContent-Length: 0\r\n\r\n"
        self._client.send(head.encode())

    def _forward(self, request: _Request, *, is_cut: bool) -> None:
        server = self._connect()
        server.send(request.head)
        first, second = _halves(*_body(self._client, request.head))
        for piece in first:
            server.send(piece)
        self._proxy.reached(request, "half", self._client)
        if is_cut:
            self._lose(request, "cut")
        for piece in second:
            server.send(piece)

    def _relay(self, request: _Request, fault: Fault | None, done: str) -> bool:
        """The server's answer to the client; whether both connections stay."""
        assert self._server is not None
        head = self._server.until(b"\r\n\r\n")
        if not head:
            self._lose(request, "the server hung up")
        self._proxy.reached(request, "stored", self._client)
        if fault == "unanswered":
            self._lose(request, done)
        status = int(head.split(b" ", 2)[1])
        has_body = request.verb != "HEAD" and status not in {204, 304}
        first, second = _halves(*_body(self._server, head)) if has_body else (iter(()), iter(()))
        if fault != "cut":  # noted before the client knows, who may look at once
            self._proxy.note(request, done, status)
        self._client.send(head)
        for piece in first:
            self._client.send(piece)
        if fault == "cut":
            self._lose(request, done)
        for piece in second:
            self._client.send(piece)
        self._proxy.reached(request, "answered", self._client)
        return (_field(head, "connection") or "").lower() != "close"

    def _connect(self) -> _Peer:
        """The connection of the request before, unless the server has closed it or moved."""
        if self._server is not None and (self._address != self._proxy.upstream or self._server.gone()):
            self._server.reset()
            self._server = None
        if self._server is None:
            self._address = self._proxy.upstream
            where = urlsplit(self._address)
            self._server = _Peer(socket.create_connection((where.hostname or "", where.port or 80)))
        return self._server

    def close(self) -> None:
        """End both connections; what the server has of an unfinished request is lost."""
        self._client.close()
        if self._server is not None:
            self._server.reset()
