"""Kills at chosen moments of `raycnn label`, whose drivers are started again until one of them ends well."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import pyarrow.parquet as pq
from fault_proxy import FaultProxy, Rule, Seen, Stage
from oracle import BUCKET, Bucket, Source, Tally

RAYCNN = str(Path(sys.executable).with_name("raycnn"))
DRIVER_S = 600
"""A command that takes longer hangs."""

PART = r"/labels/fp=[^/]*/part-[^/]*\.parquet$"
PLANS = r"/plan/"
SUCCESS = r"/_SUCCESS-g0000\.json$"

Kind = Literal["driver", "worker"]


@dataclass
class Kill:
    """What is to happen when the nth request of such a process comes to a stage."""

    step: str
    method: str
    key: str
    stage: Stage
    of: Kind
    """Whose request it is that is waited for."""
    act: Callable[["Labeling", int], None]
    """Is called with the run and the id of the process whose request it is, which waits."""
    nth: int = 1
    delay: float = 0.0
    exits: tuple[int, ...] = (0,)
    """How the driver may end, if it ends before its work does."""
    mend: Callable[["Labeling"], None] = lambda run: None
    """Is called by the main thread, a moment later."""
    at_end: bool = False
    """Whether `mend` waits until the driver has ended."""
    held: threading.Event | None = None
    """What the request itself waits for, after `act`."""


class Killed(NamedTuple):
    """A kill that has happened: what was in flight then."""

    step: str
    requests: int
    """Length of the log."""
    parts: frozenset[str]
    """Those that were committed."""


def shoot(pid: int) -> None:
    """kill -9, and wait until nothing of the process is left."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([handle], [], [], 30)
        os.close(handle)


def shoot_sender(run: "Labeling", pid: int) -> None:
    """The process whose request it is."""
    del run
    shoot(pid)


def shoot_driver(run: "Labeling", pid: int) -> None:
    """The driver, whosever request it is."""
    del pid
    shoot(run.driver)


@dataclass
class Labeling:
    """One output, and the drivers that one after another work on it until one of them ends well."""

    proxy: FaultProxy
    bucket: Bucket
    source: Source
    out: str
    bundle: str
    environment: dict[str, str]
    """Of the driver, over that of this process."""
    options: tuple[str, ...] = ()
    killed: list[Killed] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    """The ETag of each object of the output when it was first seen."""
    altered: set[str] = field(default_factory=set)
    codes: list[int] = field(default_factory=list)
    driver: int = 0

    def __post_init__(self) -> None:
        self._earlier: list[Seen] = []
        self._first = len(self.proxy.requests)
        self._folder = Path(self.bundle).parent
        self.processes: list[subprocess.Popen[bytes]] = []
        self._is_left = self.is_shared = False

    @property
    def log(self) -> list[Seen]:
        """The requests of this run."""
        return self._earlier + self.proxy.requests[self._first :]

    def obey(self, *rules: Rule) -> None:
        """Have the proxy follow other rules, which forgets its log."""
        self._earlier, self._first = self.log, 0
        self.proxy.rules = rules

    @property
    def command(self) -> list[str]:
        data, out = f"s3://{BUCKET}/{self.source.prefix}", f"s3://{BUCKET}/{self.out}"
        return [RAYCNN, "label", data, out, "--bundle", self.bundle, *self.options]

    def start(self) -> subprocess.Popen[bytes]:
        """The driver, as a user starts it."""
        with open(self._errors_of(len(self.processes)), "wb") as errors:
            process = subprocess.Popen(
                self.command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def _errors_of(self, number: int) -> Path:
        return self._folder / f"driver-{number}.log"

    def leave(self) -> None:
        """Do not wait for the driver, which may go on: start another one."""
        self._is_left = self.is_shared = True

    def last_words(self, process: subprocess.Popen[bytes]) -> str:
        """What a driver has said at its end."""
        text = self._errors_of(self.processes.index(process)).read_text("utf-8", "replace")
        return " | ".join([line.strip() for line in text.split("\n") if line.strip()][-4:])[-600:]

    @property
    def refused(self) -> int:
        """Requests that wanted to delete or to copy."""
        return sum(request.done == "refused" for request in self.log)

    def look(self) -> dict[str, str]:
        """The output's ETags; what was seen before and is another, or gone, is noted."""
        now = self.bucket.etags(self.out)
        self.altered |= {path for path, etag in self.seen.items() if now.get(path) != etag}
        self.seen = now | self.seen
        return now

    def work(self, kills: Iterable[Kill] = ()) -> None:
        """Drivers, one after another, until one ends well; the kills happen one after another.

        Raises:
            AssertionError: a kill was not reached, or a driver has ended as none may.
        """
        waiting = [_Armed(self, kill) for kill in kills]
        while True:
            process = self.start()
            self.driver = process.pid
            last = self._accompany(process, waiting)
            if self._is_left:
                self._is_left = False
                continue
            self.codes.append(code := process.wait())
            if waiting and waiting[0].finish():
                last = waiting.pop(0)
            if code == 0 and not waiting:
                break
            steps = ", ".join(armed.kill.step for armed in waiting)
            assert code != 0, f"never reached: {steps}; drivers ended with {self.codes}: {self.last_words(process)}"
            assert code in (last.kill.exits if last is not None else ()), self._ended(process)
        self.look()

    def _accompany(self, process: subprocess.Popen[bytes], waiting: list["_Armed"]) -> "_Armed | None":
        """Wait for a driver's end, kills meanwhile; the last of them."""
        until, last = time.monotonic() + DRIVER_S, None
        while process.poll() is None and not self._is_left:
            is_ending = last is not None and 0 not in last.kill.exits
            if waiting and not is_ending and waiting[0].advance():
                last = waiting.pop(0)
            if time.monotonic() > until:
                shoot(process.pid)
                raise AssertionError(f"hangs: {self.last_words(process)}")
            time.sleep(0.02)
        return last

    def _ended(self, process: subprocess.Popen[bytes]) -> str:
        return f"driver ended with {process.poll()}: {self.last_words(process)}"

    def note(self, step: str) -> None:
        """A kill is about to happen."""
        parts = frozenset(path for path in self.look() if re.search(PART, path))
        self.killed.append(Killed(step, len(self.log), parts))

    def tally(self) -> Tally:
        """The output's rows against the source's images."""
        now = self.look()
        expected, rows = self.source.keys(self.bucket), Counter[str]()
        for path in now:
            if path.startswith(f"{self.out}/labels/"):
                rows.update(pq.read_table(io.BytesIO(self.bucket.get(path)), columns=["key"])["key"].to_pylist())
        return Tally(
            expected=expected.total(),
            present=sum(1 for key in expected if rows[key]),
            lost=sum(1 for key in expected if not rows[key]),
            duplicate=sum(n - 1 for n in rows.values()),
            foreign=sum(1 for key in rows if key not in expected),
            altered=len(self.altered),
        )

    def labels(self) -> dict[str, tuple[str, str | None]]:
        """(status, class) by key."""
        paths = [path for path in self.seen if re.search(PART, path)]
        tables = [pq.read_table(io.BytesIO(self.bucket.get(p)), columns=["key", "status", "class_name"]) for p in paths]
        return {row["key"]: (row["status"], row["class_name"]) for t in tables for row in t.to_pylist()}

    def redone(self) -> "Redone":
        """What was done more than once."""
        puts = Counter(r.key for r in self.log if r.method == "PUT" and re.search(PART, r.key))
        times, again, in_flight = Counter[int](), 0, 0
        unit_of = self._units() if self.source.layout == "flat" else {}
        gets = [(at, r) for at, r in enumerate(self.log) if r.method == "GET" and r.key in unit_of]
        # What was killed when it had been answered stands there twice.
        reads = [(at, unit_of[r.key], r.key) for at, r in gets if r.done != "killed at answered"]
        for (unit, _), n in Counter((unit, key) for _, unit, key in reads).items():
            times[unit] = max(times[unit], n)
        for kill in self.killed:
            finished = {int(re.findall(r"-(\d+)\.", path)[-1]) for path in kill.parts}
            again += len({unit for at, unit, _ in reads if at >= kill.requests and unit in finished})
            in_flight += len({unit for at, unit, _ in reads if at < kill.requests} - finished)
        return Redone(sum(n - 1 for n in times.values()), sum(n - 1 for n in puts.values()), again, in_flight)

    def bound(self) -> int:
        """How many units may be redone: those in flight, and one for each kill that may have been begun meanwhile."""
        return self.redone().in_flight + len(self.killed)

    def _units(self) -> dict[str, int]:
        """The unit that holds each object of the source, as the plan has it."""
        found, first = dict[str, int](), 0
        for page in json.loads(self.bucket.get(f"{self.out}/plan/g0000.json"))["pages"]:
            table = pq.read_table(io.BytesIO(self.bucket.get(f"{self.out}/{page['path']}")), columns=["unit", "path"])
            found |= {f"{self.source.prefix}/{row['path']}": first + row["unit"] for row in table.to_pylist()}
            first += len(page["unit_rows"])
        return found


class Redone(NamedTuple):
    """Units that were done more than once."""

    read: int
    """Times that a unit was read beyond the first; of flat collections only, as the next two."""
    put: int
    """Times that a part was sent beyond the first."""
    finished: int
    """Units that were read again though they had been committed: none may be."""
    in_flight: int
    """Units that had been begun and not committed, over all kills: what may be redone."""


class _Armed:
    """A kill that waits for its moment, once it is the next."""

    def __init__(self, run: Labeling, kill: Kill) -> None:
        self.kill, self._run = kill, run
        self._count, self._lock = 0, threading.Lock()
        self._is_armed = self._is_mended = False
        self._happened = threading.Event()
        self._failed: BaseException | None = None

    def advance(self) -> bool:
        """Arm it, or mend what it has broken; whether it is over."""
        if not self._is_armed:
            self._is_armed = True
            self._run.proxy.on(self.kill.method, self._pattern, self.kill.stage, self._met, nth=None)
        if not self._happened.is_set() or (self.kill.at_end and not self._is_mended):
            return False
        return self.finish()

    def finish(self) -> bool:
        """Mend what it has broken, if it has happened; whether it has."""
        with self._lock:  # a driver may be seen to be dead before its kill is seen to have happened
            if not self._happened.is_set():
                return False
        if self._failed is not None:
            raise self._failed
        if not self._is_mended:
            self._is_mended = True
            self.kill.mend(self._run)
        return True

    @property
    def _pattern(self) -> str:
        below = self._run.source.prefix if self.kill.method in ("GET", "LIST") else self._run.out
        return f"^{re.escape(below)}{self.kill.key}"

    def _met(self, port: int) -> None:
        """Called on a thread of the proxy."""
        if self._happened.is_set():
            return
        with self._lock:
            if self._happened.is_set() or (pid := self._due(port)) is None:
                return
            self._run.proxy.off(self._met)
            try:
                time.sleep(self.kill.delay)
                self._run.note(self.kill.step)
                self.kill.act(self._run, pid)
            except BaseException as error:
                self._failed = error
                raise
            finally:
                self._happened.set()
        if self.kill.held is not None:
            self.kill.held.wait()

    def _due(self, port: int) -> int | None:
        """The process that has sent the request, if it is the one that is waited for."""
        self._count += 1
        if self._count < self.kill.nth or not (pid := sender(port)):
            return None
        return pid if (pid == self._run.driver) == (self.kill.of == "driver") else None


def sender(port: int) -> int:
    """The process at the other end of a connection from this port of this machine."""
    for one in psutil.net_connections("tcp4"):
        if one.laddr and one.laddr.port == port and one.pid:
            return one.pid
    return 0


def proven(run: Labeling) -> Tally:
    """The rows of a run that has ended, and that all else is as it should be.

    Raises:
        AssertionError: something is not.
    """
    tally, finished = run.tally(), run.redone().finished
    assert tally.is_right, str(tally)
    assert "crashed" not in {status for status, _ in run.labels().values()}, "a killed process became a row"
    assert finished == 0, f"{finished} units were read again after they had been committed"
    before = run.look()
    quietly(["verify", f"s3://{BUCKET}/{run.out}"])
    quietly(run.command[1:])
    assert run.look() == before, "the command once more has written something"
    assert run.refused == 0, f"{run.refused} requests wanted to delete or to copy"
    return tally


def quietly(command: list[str]) -> None:
    """A command of raycnn's, which has to succeed, in this process, where it starts sooner."""
    from raycnn import cli

    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = cli.run(command)
    assert code == 0, f"raycnn {command[0]} ended with {code}: {said.getvalue()[-300:]}"


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


def raylet_of(pid: int) -> int:
    """The raylet that has started a worker."""
    return next(parent.pid for parent in psutil.Process(pid).parents() if "raylet" in parent.name())


class Zombie:
    """A process that is stopped while its PUT waits; others do its work; then it goes on."""

    def __init__(self) -> None:
        self.stopped: list[int] = []
        self._held = threading.Event()

    def kill(self, of: Kind, key: str, nth: int) -> Kill:
        """What is to happen: the process that creates such an object is stopped before any of it has been sent on."""
        return Kill("SIGSTOP", "PUT", key, "request", of, self.stop, nth, held=self._held)

    def stop(self, run: Labeling, pid: int) -> None:
        """Stop it, and let another driver do the work."""
        self.suspend(pid)
        run.leave()

    def suspend(self, *pids: int) -> None:
        """SIGSTOP."""
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            self.stopped.append(pid)

    def go_on(self, run: Labeling) -> None:
        """Its late PUT has to be refused, and nothing may change.

        Raises:
            AssertionError: it is not so.
        """
        seen, before = len(run.log), run.look()
        os.kill(self.stopped[-1], signal.SIGCONT)
        self._held.set()
        until = time.monotonic() + 60
        while not any(request.method == "PUT" and request.status == 412 for request in run.log[seen:]):
            assert time.monotonic() < until, "the zombie does not go on"
            time.sleep(0.05)
        for process in run.processes:
            assert process.wait(60) in (0, -9), run.last_words(process)
        assert run.look() == before, "the zombie has changed something"
