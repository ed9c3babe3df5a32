"""The exactly-once protocol under every interleaving that Hypothesis finds: crashes, zombies, generations, bad stores.

Drivers and workers are threads that stop before each storage call; the machine says who goes on, and what happens to
the call. So one that was suspended with a finished part, and goes on after the run has ended, is an ordinary case.
"""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_store import FAILURES, OPEN, Actor, Crash, MemoryStore, Mode, Planned, Verdict, World
from test_ledger import finish, part

from raycnn.config import VerifyConfig
from raycnn.errors import ConfigError, StorageError
from raycnn.ledger import Growth, Ledger, UnitRef, label_ledger, new_slices, pages, success_path, verification, verify

ACTORS = 6
"""Processes at a time."""
IDENTITIES = (
    ({"data": "memory", "split": "all"}, {"weights": "abc"}),
    ({"data": "memory", "split": "val"}, {"weights": "abc"}),
    ({"data": "memory", "split": "all"}, {"weights": "other"}),
)
"""Selections and fingerprints of those who come to the same output."""


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
        self.patch.setattr(pages, "PAGE_UNITS", 2)
        for module in (pages, verification):
            self.patch.setattr(module, "open_store", OPEN.__getitem__)
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
