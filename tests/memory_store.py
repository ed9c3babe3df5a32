"""Processes that share an output in memory, each of which stops before every call that it makes to the store."""

import builtins
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from typing_extensions import override

from raycnn.errors import ObjectMissing, StorageError
from raycnn.shards import Slice, path_order
from raycnn.storage import Entry, Store

Mode = Literal["conditional", "single driver", "ignores the condition"]
Verdict = Literal["go", "crash before", "crash after", "refused", "answer lost", "timeout after"]

FAILURES: tuple[Verdict, ...] = ("crash before", "crash after", "refused", "answer lost", "timeout after")
PAGE = 3
"""Names in one page of a listing."""
OPEN: dict[str, "MemoryStore"] = {}
"""By URL."""
NAMES = itertools.count()


class Crash(BaseException):
    """kill -9: nothing that the ledger does can catch it."""


class Planned(StorageError):
    """A failure of the store that the machine has chosen."""


class World:
    """What all processes share: the objects of the output, and those of the collection."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.objects: dict[str, bytes] = {}
        self.collection: dict[str, tuple[str, int]] = {}
        """(ETag, members) by path."""
        self.created = 0
        self.replaced = False

    def write(self, path: str, data: bytes) -> None:
        self.replaced |= path in self.objects
        self.objects[path] = data
        self.created += 1

    def create(self, path: str, data: bytes) -> bool:
        if path in self.objects and self.mode == "conditional":
            return False
        self.write(path, data)
        return True

    def listed(self) -> list[Slice]:
        """The samples of the collection, in order of the objects' paths."""
        found = []
        for path in sorted(self.collection, key=path_order):
            etag, members = self.collection[path]
            found += [Slice(f"{path}#{i}", path, 10, etag, i, 1, i, 10, -1) for i in range(members)]
        return found


class MemoryStore(Store):
    """One process's sight of the world; `ask` is called before each call and may stop, fail or end it."""

    def __init__(self, world: World, ask: Callable[[], Verdict]) -> None:
        self._world, self._ask = world, ask
        self.url = f"memory://{next(NAMES)}"
        OPEN[self.url] = self

    def _call(self, effect: Callable[[], Any], lost: Any = None) -> Any:
        verdict = self._ask()
        if verdict == "crash before":
            raise Crash
        if verdict == "refused":
            raise Planned("the store keeps failing (HTTP 503 SlowDown)")
        result = effect()
        if verdict == "crash after":
            raise Crash
        if verdict == "timeout after":
            raise Planned("cannot reach the store (timed out)")
        return result if verdict == "go" or lost is None else lost

    @property
    @override
    def is_local(self) -> bool:
        return False

    @override
    def address(self, path: str = "") -> str:
        return f"{self.url}/{path}".rstrip("/")

    @override
    def list(self, prefix: str = "") -> Iterator[Entry]:
        after = ""
        while names := self._call(lambda after=after: self._page(prefix, after)):
            yield from (Entry(name, 1, "") for name in names)
            after = names[-1]

    def _page(self, prefix: str, after: str) -> builtins.list[str]:
        names = (name for name in sorted(self._world.objects) if name.startswith(prefix) and name > after)
        return list(itertools.islice(names, PAGE))

    @override
    def head(self, path: str) -> Entry | None:
        return self._call(lambda: Entry(path, 1, "") if path in self._world.objects else None)

    @override
    def get(self, path: str, *, if_match: str | None = None) -> bytes:
        if (data := self._call(lambda: self._world.objects.get(path))) is None:
            raise ObjectMissing(path)
        return data

    @override
    def create(self, path: str, data: bytes) -> bool:
        world = self._world
        if world.mode == "single driver":
            if self.head(path) is None:
                self._call(lambda: world.write(path, data))
                return True
            return False
        # Repeated after a lost answer, the first try is found, unless the store does not look.
        return self._call(lambda: world.create(path, data), lost=world.mode != "conditional")

    def collection(self) -> builtins.list[Slice]:
        """The collection as it is listed now."""
        return self._call(self._world.listed)

    @override
    def single_driver(self) -> Store:
        return self

    def _never(self, *args: object, **options: object) -> Any:
        raise AssertionError("the ledger lists, reads and creates, nothing else")

    @override
    def child(self, path: str) -> Store:
        return self._never()

    @override
    def children(self, folder: str = "") -> tuple[builtins.list[str], builtins.list[str]]:
        return self._never()

    @override
    def get_ranges(
        self, path: str, ranges: Sequence[tuple[int, int]], *, if_match: str | None = None
    ) -> builtins.list[bytes]:
        return self._never()

    @override
    def open(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        return self._never()

    @override
    def stream(self, path: str, *, if_match: str | None = None) -> BinaryIO:
        return self._never()

    @override
    def put(self, path: str, data: bytes) -> Entry:
        return self._never()

    @override
    def put_file(self, path: str, file: Path) -> Entry:
        return self._never()


class Actor:
    """A process: its program runs up to a storage call, and waits there for `step`."""

    def __init__(self, world: World, program: Callable[[MemoryStore], int], identity: int) -> None:
        self.identity = identity
        self.result: int | BaseException | None = None
        """None while it runs; what the program gave, or how it ended."""
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._verdict: Verdict = "go"
        self._thread = threading.Thread(target=self._run, args=(program, MemoryStore(world, self._ask)), daemon=True)
        self._thread.start()
        self._stopped.acquire()

    def _run(self, program: Callable[[MemoryStore], int], store: MemoryStore) -> None:
        try:
            self.result = program(store)
        except BaseException as error:  # noqa: BLE001  the machine looks at it
            self.result = error
        self._stopped.release()

    def _ask(self) -> Verdict:
        self._stopped.release()
        self._go.acquire()
        return self._verdict

    def step(self, verdict: Verdict = "go") -> None:
        """Let the call have this outcome, and the program go on to the next one."""
        if self.result is None:
            self._verdict = verdict
            self._go.release()
            self._stopped.acquire()

    def to_the_end(self) -> None:
        while self.result is None:
            self.step()
