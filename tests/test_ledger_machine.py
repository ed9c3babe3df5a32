"""The exactly-once protocol under every interleaving that Hypothesis finds: crashes, zombies, generations, bad stores.

Drivers and workers are threads that stop before each storage call; the machine says who goes on, and what happens to
the call. So one that was suspended with a finished part, and goes on after the run has ended, is an ordinary case.
"""

import builtins
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_ledger import finish, part
from typing_extensions import override

from raycnn import ledger as ledgers
from raycnn.config import VerifyConfig
from raycnn.errors import ConfigError, ObjectMissing, StorageError
from raycnn.ledger import Growth, Ledger, UnitRef, label_ledger, new_slices, success_path, verify
from raycnn.shards import Slice, path_order
from raycnn.storage import Entry, Store

Mode = Literal["conditional", "single driver", "ignores the condition"]
Verdict = Literal["go", "crash before", "crash after", "refused", "answer lost", "timeout after"]

FAILURES: tuple[Verdict, ...] = ("crash before", "crash after", "refused", "answer lost", "timeout after")
PAGE = 3
"""Names in one page of a listing."""
ACTORS = 6
"""Processes at a time."""
IDENTITIES = (
    ({"data": "memory", "split": "all"}, {"weights": "abc"}),
    ({"data": "memory", "split": "val"}, {"weights": "abc"}),
    ({"data": "memory", "split": "all"}, {"weights": "other"}),
)
"""Selections and fingerprints of those who come to the same output."""
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


def drive(store: MemoryStore, identity: int, size: int, seed: int, sent: list[UnitRef]) -> int:
    """What `raycnn label` does with the ledger; how many parts it has created. `sent` is what it gave to workers."""
    selection, fingerprint = IDENTITIES[identity]
    ledger = label_ledger(store, fingerprint)
    plans = ledger.plans()
    for plan in plans:
        ledger.check(plan, selection, fingerprint)
    if not plans or all(ledger.success(plan.generation) for plan in plans):
        new = list(new_slices(store.collection(), ledger.planned(plans), Growth()))
        if new:
            units = [new[i : i + size] for i in range(0, len(new), size)]
            plans.append(ledger.plan(len(plans), units, selection, fingerprint, Counter()))
    ledger.probe(plans[0])
    written = 0
    for plan in plans:
        pending = ledger.pending(plan)
        if pending or ledger.success(plan.generation) is None:
            sent += pending
            for ref in random.Random(seed).sample(pending, len(pending)):
                written += label_unit(store, identity, ref)
            finish(ledger, plan)
    return written


def label_unit(store: MemoryStore, identity: int, ref: UnitRef) -> bool:
    """What a worker does with the ledger. No two make the same bytes."""
    ledger = label_ledger(store, IDENTITIES[identity][1])
    return ledger.commit(ref, part(ledger, ref, made_by=store.url), ref.rows)


def verify_meanwhile(store: MemoryStore) -> int:
    """What `raycnn verify` does; it creates no part."""
    report = verify(VerifyConfig(out=store.url))
    assert (report.duplicate, report.foreign, report.altered) == (0, 0, 0)
    assert report.unfinished or not report.lost
    return 0


class LedgerMachine(RuleBasedStateMachine):
    """Any number of processes on one output: they start, go on, fail and die, while the collection changes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(ledgers, "PAGE_UNITS", 2)
        self.patch.setattr(ledgers, "open_store", OPEN.__getitem__)
        self.actors: list[Actor] = []
        self.sent: list[UnitRef] = []
        self.versions = 0
        self.inspected = -1

    @initialize(
        mode=st.sampled_from(["conditional"] * 6 + ["single driver", "ignores the condition"]),
        objects=st.integers(1, 5),
    )
    def begin(self, mode: Mode, objects: int) -> None:
        self.world = World(mode)
        self.outside = MemoryStore(self.world, lambda: "go")
        for i in range(objects):
            self.put_object(f"{i}.tar", 1 + i % 3)
        for size in (1, 2):
            self.start_driver(0, size, 0)

    @rule(identity=st.sampled_from([0] * 8 + [1, 2]), size=st.integers(1, 3), seed=st.integers(0, 9))
    def start_driver(self, identity: int, size: int, seed: int) -> None:
        self._start(lambda store: drive(store, identity, size, seed, self.sent), identity)

    @precondition(lambda self: self.sent and self.world.mode == "conditional")
    @rule(which=st.integers(0, 99))
    def start_worker(self, which: int) -> None:
        """On a unit that any driver has ever sent: it may be dead since, and the unit done."""
        ref, identity = self.sent[which % len(self.sent)], self._owner()
        self._start(lambda store: label_unit(store, identity, ref), identity)

    @precondition(lambda self: self.sent and self.world.mode == "conditional")
    @rule()
    def start_verifying(self) -> None:
        """While others go on: it may find that the run is not over, but no damage."""
        self._start(verify_meanwhile, self._owner())

    def _start(self, program: Callable[[MemoryStore], int], identity: int) -> None:
        if self.world.mode == "single driver":
            self._kill_all()
        if len(self.actors) < ACTORS:
            self.actors.append(Actor(self.world, program, identity))

    @precondition(lambda self: self.actors)
    @rule(turns=st.lists(st.tuples(st.integers(0, 99), st.sampled_from([1, 2, 3, 5, 8])), min_size=1, max_size=8))
    def take_turns(self, turns: list[tuple[int, int]]) -> None:
        """Processes go on by turns, each for some storage calls."""
        for which, calls in turns:
            for _ in range(calls):
                self.actors[which % len(self.actors)].step()
                self.nothing_is_wrong()
        self._retire()

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 99), failure=st.sampled_from(FAILURES))
    def fail(self, which: int, failure: Verdict) -> None:
        self.actors[which % len(self.actors)].step(failure)
        self._retire()

    @precondition(lambda self: self.actors)
    @rule(which=st.integers(0, 99))
    def go_to_the_end(self, which: int) -> None:
        self.actors[which % len(self.actors)].to_the_end()
        self._retire()

    @rule(name=st.sampled_from(["0.tar", "00", "1.tar", "3", "5.tar", "\u00e9", "z"]), members=st.integers(1, 3))
    def put_object(self, name: str, members: int) -> None:
        """Into the collection: a new one, or another version of one."""
        self.versions += 1
        self.world.collection[name] = f"etag-{self.versions}", members

    @precondition(lambda self: len(self.world.collection) > 1)
    @rule(which=st.integers(0, 99))
    def remove_object(self, which: int) -> None:
        del self.world.collection[sorted(self.world.collection)[which % len(self.world.collection)]]

    @rule()
    def complete(self) -> None:
        """Wherever all others are suspended: a driver that nothing happens to comes to the end, and all is labelled."""
        if self.world.mode == "single driver":
            self._kill_all()
        if self.world.mode == "ignores the condition":
            with pytest.raises(StorageError, match="ignores If-None-Match"):
                self._drive()
            return
        self._drive()
        self._drive()  # who finds an unfinished generation does not look for what is new
        created = self.world.created
        assert self._drive() == 0
        assert self.world.created == created, "running again has written something"
        report = verify(VerifyConfig(out=self.outside.url))
        assert (report.error, report.present) == (None, report.expected)
        planned = {piece.path for piece in Ledger(self.outside, "").planned(Ledger(self.outside, "").plans())}
        assert planned >= self.world.collection.keys()

    def _drive(self) -> int:
        return drive(self.outside, self._owner(), 2, 0, self.sent)

    @invariant()
    def nothing_is_wrong(self) -> None:
        """Nothing is replaced, planned twice, or labelled without a plan; nobody says it is done before it is."""
        if not hasattr(self, "world") or self.world.created == self.inspected:
            return
        self.inspected, objects = self.world.created, self.world.objects
        labels = {path for path in objects if path.startswith("labels/")}
        if self.world.mode == "ignores the condition":
            assert not labels
            return
        assert not self.world.replaced
        ledger = label_ledger(self.outside, IDENTITIES[self._owner()][1])
        plans = ledger.plans()
        keys = [piece.key for piece in ledger.planned(plans)]
        assert len(keys) == len(set(keys)) == sum(plan.rows for plan in plans)
        assert labels <= {ledger.path(ref) for plan in plans for ref in plan.refs}
        finished = [success_path(plan.generation) in objects for plan in plans]
        assert all(finished[:-1])
        assert not any(done and ledger.pending(plan) for done, plan in zip(finished, plans, strict=True))

    def _owner(self) -> int:
        """Whose output it is: theirs who planned first."""
        plans = Ledger(self.outside, "").plans()
        found = [(plan.content["selection"], plan.content["fingerprint"]) for plan in plans]
        assert all(identity == found[0] for identity in found)
        return IDENTITIES.index(found[0]) if found else 0

    def _retire(self) -> None:
        """Let go of the processes that have ended, if they ended as they should."""
        for actor in [actor for actor in self.actors if actor.result is not None]:
            self.actors.remove(actor)
            if isinstance(actor.result, int):
                assert actor.identity == self._owner()
                assert self.world.mode != "ignores the condition"
            elif isinstance(actor.result, ConfigError):
                assert actor.identity != self._owner() or self.world.mode == "ignores the condition"
            elif not isinstance(actor.result, Crash | Planned):
                assert self.world.mode == "ignores the condition"
                assert isinstance(actor.result, StorageError)

    def _kill_all(self) -> None:
        for actor in self.actors:
            actor.step("crash before")
        self._retire()
        assert not self.actors

    def teardown(self) -> None:
        """All is finished, then the suspended ones wake, and after them all is well still."""
        try:
            self.complete()
            for actor in [*self.actors]:
                actor.to_the_end()
                self.nothing_is_wrong()
            self._retire()
            self.complete()
            self.nothing_is_wrong()
        finally:
            for actor in self.actors:
                actor.step("crash before")
            self.patch.undo()
            OPEN.clear()


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_every_key_is_labelled_exactly_once = pytest.mark.slow(LedgerMachine.TestCase)
