"""Pixels made in a process of its own, which may crash or hang without harm to the one that asks.

It costs a copy of the image through a pipe, and a few seconds when the process starts; so this is for images that are
under suspicion. Requests and replies are frames: the lengths of a JSON header and of a body, then both.
"""

import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from raycnn.config import ImageSpec
from raycnn.errors import Bad, RaycnnError, Status
from raycnn.images import Pixels, pixels, prepare_to_resize

DECODE_TIMEOUT_S = 30.0
"""One image's cap on time: what takes longer hangs, as far as anybody can tell."""

_START_TIMEOUT_S = 300.0  # to import torch takes seconds, and minutes from a cold network disk
_GRACE_S = 10.0
_LENGTHS = struct.Struct(">IQ")  # bytes of the header, bytes of the body
_PIECE = 1 << 20


class Isolated:
    """Makes pixels in a child process, one image at a time; to be used as a context manager by one thread.

    The child starts with the first image, and again after each one that it did not survive.

    Args:
        timeout_s: Seconds that one image may take, counted from when the child is ready.
    """

    def __init__(self, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def pixels(self, encoded: bytes | None, spec: ImageSpec) -> Pixels | Bad:
        """What `raycnn.images.pixels(encoded, spec)` gives, or a Bad of status CRASHED or TIMEOUT.

        RaycnnError where no child can be started, which is no image's fault.
        """
        if self._child and self._child.poll() is not None:  # somebody has killed it between two images
            self._stop()
        child = self._child or self._start()
        request = _frame(spec.model_dump_json().encode(), encoded or b"")
        try:
            header, body = _exchange(child, request, self._timeout_s)
        except TimeoutError:
            self._stop()
            return Bad(Status.TIMEOUT, f"not decoded in {self._timeout_s:g} s")
        except EOFError:
            return _autopsy(self._stop(patience_s=5), self._timeout_s)
        except BaseException:  # Ctrl-C: the reply of this child would be taken for that of the next image
            self._stop()
            raise
        if "shape" in header:
            return np.frombuffer(body, np.uint8).reshape(header["shape"])
        return Bad(Status(header["status"]), header["detail"])

    def _start(self) -> subprocess.Popen[bytes]:
        # The child finds the very modules that this process has found, however it came by them.
        path = [os.environ.get("PYTHONPATH", ""), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "raycnn.images.isolated", str(self._timeout_s + _GRACE_S)]
        # In a session of its own no Ctrl-C reaches it, which would look like a crash.
        child = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._child = child
        for pipe in _pipes(child):
            os.set_blocking(pipe, False)
        try:
            _exchange(child, b"", _START_TIMEOUT_S)
        except (EOFError, TimeoutError):
            code = self._stop(patience_s=5)
            raise RaycnnError(
                f"the process that decodes suspect images did not start (exit code {code}); "
                "what it said is on standard error, and `python -m raycnn.images.isolated 60` says it again"
            ) from None
        except BaseException:
            self._stop()
            raise
        return child

    def _stop(self, patience_s: float = 0) -> int:
        """End the child, unless it ends by itself; its exit code, or minus the signal that killed it."""
        child, self._child = self._child, None
        if not child:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()
        return child.wait()


def _autopsy(code: int, timeout_s: float) -> Bad:
    """What the end of the process says about the image that it was given."""
    if code == -signal.SIGALRM:  # the parent was stopped, for longer than the child waits
        return Bad(Status.TIMEOUT, f"not decoded in {timeout_s:g} s")
    how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
    return Bad(Status.CRASHED, f"decoding ended its process with {how}")


def _frame(header: bytes, body: bytes) -> bytes:
    return b"".join((_LENGTHS.pack(len(header), len(body)), header, body))


def _pipes(child: subprocess.Popen[bytes]) -> tuple[int, int]:
    assert child.stdin
    assert child.stdout
    return child.stdin.fileno(), child.stdout.fileno()


def _exchange(child: subprocess.Popen[bytes], request: bytes, timeout_s: float) -> tuple[dict[str, Any], bytearray]:
    """Write a request and read one frame, neither of which may wait for the other; header and body.

    EOFError where the child ends before its reply does, TimeoutError where it takes too long.
    """
    deadline = time.monotonic() + timeout_s
    to, of = _pipes(child)
    poll, unsent, reply = select.poll(), memoryview(request), bytearray()
    poll.register(of, select.POLLIN)
    if unsent:
        poll.register(to, select.POLLOUT)
    while (frame := _parse(reply)) is None:
        events = poll.poll(max(0, deadline - time.monotonic()) * 1000)
        if not events:
            raise TimeoutError
        for pipe, _ in events:
            if pipe == of:
                piece = os.read(of, _PIECE)
                if not piece:
                    raise EOFError
                reply += piece
                continue
            try:
                unsent = unsent[os.write(to, unsent[:_PIECE]) :]
            except BrokenPipeError:  # it has died, and its reply ends, too
                unsent = unsent[:0]
            if not unsent:
                poll.unregister(to)
    return frame


def _parse(reply: bytearray) -> tuple[dict[str, Any], bytearray] | None:
    """The frame, once it is whole."""
    if len(reply) < _LENGTHS.size:
        return None
    header, body = _LENGTHS.unpack_from(reply)
    if len(reply) < _LENGTHS.size + header + body:
        return None
    at = _LENGTHS.size + header
    return json.loads(reply[_LENGTHS.size : at]), reply[at:]


# In the child


def _serve(requests: IO[bytes], replies: IO[bytes], alarm_s: float) -> None:
    """Answer frame by frame until the parent closes its end, as it does when it dies."""
    prepare_to_resize()
    replies.write(_frame(b"{}", b""))
    replies.flush()
    while len(lengths := requests.read(_LENGTHS.size)) == _LENGTHS.size:
        header, body = _LENGTHS.unpack(lengths)
        spec, encoded = ImageSpec.model_validate_json(requests.read(header)), requests.read(body)
        if len(encoded) < body:
            return
        # Where the parent has died, nobody else ends a decoder that hangs.
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
        image = pixels(encoded, spec)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if isinstance(image, Bad):
            reply = _frame(json.dumps({"status": image.status, "detail": image.detail}).encode(), b"")
        else:
            reply = _frame(json.dumps({"shape": image.shape}).encode(), image.tobytes())
        replies.write(reply)
        replies.flush()


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the frames
    with contextlib.suppress(BrokenPipeError):
        _serve(sys.stdin.buffer, replies, float(sys.argv[1]))


if __name__ == "__main__":
    _main()
