"""The layout for CPUs: one process reads, decodes, predicts and commits whole units."""

import itertools
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import raycnn
from raycnn import bundle as bundles
from raycnn import data, images
from raycnn.config import LabelConfig
from raycnn.errors import Bad, BundleError, DataError, Status
from raycnn.labeling.counts import counts_of
from raycnn.labeling.facts import facts_of, fingerprint_of
from raycnn.labeling.rows import UnitRows, written
from raycnn.labeling.speed import Stopwatch
from raycnn.ledger import Ledger, UnitRef, fingerprint_id
from raycnn.predictor import Predictor
from raycnn.shards import Collection, Sample, Slice, open_collection
from raycnn.storage import open_store

BATCH = 64
"""Images that are predicted together; they may belong to several units."""


def load_checked(config: LabelConfig, fingerprint: dict[str, Any]) -> bundles.Bundle:
    """The bundle, whose self-test runs here; refused where this node would make other rows than the plan wants."""
    bundle = bundles.load(config.bundle)
    mine = fingerprint_of(facts_of(bundle), config, fingerprint["precision"])
    if differing := sorted(k for k in mine if mine[k] != fingerprint[k]):
        raise BundleError(
            f"node {socket.gethostname()} has another {', '.join(differing)} than the plan; "
            "install the same decoder versions on every node"
        )
    return bundle


class Reader:
    """Reads units' samples, each unit's in the order of its plan."""

    def __init__(self, config: LabelConfig, ledger: Ledger) -> None:
        self._collection: Collection = open_collection(config.data, ())
        self._accept, self._ledger = config.accept_unreadable, ledger

    def groups(self, ref: UnitRef) -> Iterator[list[Sample]]:
        """The unit's samples, some at a time."""
        return data.groups(self._samples(self._ledger.slices(ref)))

    def _samples(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        if not self._accept:
            return self._collection.read(slices)
        try:
            return iter(list(self._collection.read(slices)))
        except DataError:
            return self._readable_and_not(slices)

    def _readable_and_not(self, slices: Sequence[Slice]) -> Iterator[Sample]:
        """The samples of a unit of which some object cannot be read, whose planned rows say so."""
        for _, run in itertools.groupby(slices, key=lambda piece: piece.path):
            pieces = list(run)
            try:
                samples = list(self._collection.read(pieces))
            except DataError as error:
                keys = [key for piece in pieces for key in _planned_keys(piece)]
                samples = [Sample(key, None, None, Bad(Status.UNREADABLE, str(error))) for key in keys]
            yield from samples


def _planned_keys(piece: Slice) -> list[str]:
    """The keys of a slice that cannot be read; those of Parquet rows are in the file, so that their places stand in."""
    return [piece.key] if piece.key else [f"{piece.path}#{piece.first + i}" for i in range(piece.rows)]


class Committer:
    """Makes the part of a complete unit and commits it; both layouts do it with this."""

    def __init__(
        self, config: LabelConfig, ledger: Ledger, bundle: bundles.Bundle, fingerprint: dict[str, Any], backend: str
    ) -> None:
        self._config, self._ledger, self._bundle = config, ledger, bundle
        self._top_k: int = fingerprint["top_k"]
        self._lineage = {
            "bundle": bundle.digest,
            "fingerprint": fingerprint_id(fingerprint),
            "decoder": images.DECODER,
            "backend": backend,
            "raycnn": raycnn.__version__,
        }

    def commit(self, unit: UnitRows) -> dict[str, Any]:
        """Commit the unit; the report says whether it was ours that counted. Embeddings go first."""
        ref = unit.ref
        metadata = self._lineage | {"unit": str(ref.unit), "plan": ref.plan, "rows": str(len(unit.keys))}
        table = unit.table(self._bundle.class_names, self._top_k, self._config.abstain)
        if self._config.embeddings:
            beside = unit.embeddings(self._bundle.classifier.embedding_size)
            self._ledger.put_embeddings(ref, written(beside, metadata), len(beside))
        part = written(table, metadata)
        is_ours = self._ledger.commit(ref, part, len(table))
        return self._ledger.describe(ref, part) | {"counts": counts_of(table), "written": is_ours}


class Labeler:
    """Lives in one Ray worker; a later run of the same driver may find it there."""

    def __init__(self, config: dict[str, Any], parts: str, fingerprint: dict[str, Any], device: str) -> None:
        """Load the bundle and check that this node makes the same rows."""
        torch.set_num_threads(1)
        self._config = LabelConfig(**config)
        bundle = load_checked(self._config, fingerprint)
        self._spec = bundle.spec
        self._predictor = Predictor(bundle, device, top_k=fingerprint["top_k"])
        self._ledger = Ledger(open_store(self._config.out), parts)
        self._reader = Reader(self._config, self._ledger)
        self._committer = Committer(self._config, self._ledger, bundle, fingerprint, self._predictor.backend)

    def __call__(self, items: list[dict[str, Any]], is_again: bool) -> Iterator[dict[str, Any]]:
        """Label and commit each unit. While one is decoded, the next is read and the last one committed."""
        refs = [UnitRef(**item) for item in items]
        with data.Decoder(self._spec, is_again) as decoder, ThreadPoolExecutor(1) as pool:
            yield from _Batch(self._predictor, self._committer, decoder, pool, self._config.embeddings).work(
                data.read_ahead(self._read(refs))
            )

    def _read(self, refs: list[UnitRef]) -> Iterator[tuple[UnitRows, list[Sample] | None]]:
        """(unit, some of its samples) until all are read, then (unit, None); only the latter for what is done."""
        for ref in refs:
            unit = UnitRows(ref)
            unit.was_committed = self._ledger.is_committed(ref)
            if not unit.was_committed:
                for group in self._reader.groups(ref):
                    yield unit, group
            yield unit, None


class _Batch:
    """One batch of units on its way through a worker."""

    def __init__(
        self,
        predictor: Predictor,
        committer: Committer,
        decoder: data.Decoder,
        pool: ThreadPoolExecutor,
        with_embeddings: bool,
    ) -> None:
        self._predictor, self._committer, self._decoder, self._pool = predictor, committer, decoder, pool
        self._with_embeddings = with_embeddings
        self._watch = Stopwatch()
        self._waiting: deque[tuple[UnitRows, images.Pixels]] = deque()
        self._units: deque[UnitRows] = deque()
        self._committing: deque[Future[dict[str, Any]]] = deque()

    def work(self, samples: Iterator[tuple[UnitRows, list[Sample] | None]]) -> Iterator[dict[str, Any]]:
        """The reports of the units, in order."""
        while True:
            with self._watch.stage("read"):
                found = next(samples, None)
            if found is None:
                break
            unit, group = found
            if group is None:
                unit.is_read = True
                self._units.append(unit)
            else:
                self._decode(unit, group)
            while len(self._waiting) >= BATCH:
                self._predict(BATCH)
            yield from self._finished()
        if self._waiting:
            self._predict(len(self._waiting))
        self._commit_complete()
        while self._committing:
            with self._watch.stage("commit"):
                self._committing[0].exception()
            yield self._result()

    def _decode(self, unit: UnitRows, group: list[Sample]) -> None:
        with self._watch.stage("decode"):
            made = self._decoder.decode(group)
        for sample, pixels in zip(group, made, strict=True):
            if isinstance(pixels, Bad):
                unit.add(sample.key, pixels)
            else:
                unit.add(sample.key, None)
                self._waiting.append((unit, pixels))
        self._watch.count(len(group), self._decoder.is_isolated)

    def _predict(self, count: int) -> None:
        taken = [self._waiting.popleft() for _ in range(count)]
        with self._watch.stage("model"):
            batch = np.stack([pixels for _, pixels in taken])
            predictions = self._predictor.predict(batch, self._with_embeddings)
        start = 0
        for unit, run in itertools.groupby((unit for unit, _ in taken), key=lambda unit: unit):
            stop = start + sum(1 for _ in run)
            unit.predict(predictions, start, stop)
            start = stop

    def _finished(self) -> Iterator[dict[str, Any]]:
        """Reports of what has been committed meanwhile."""
        self._commit_complete()
        while self._committing and self._committing[0].done():
            yield self._result()

    def _commit_complete(self) -> None:
        while self._units and self._units[0].is_complete:
            unit = self._units.popleft()
            self._committing.append(self._pool.submit(self._commit, unit))

    def _commit(self, unit: UnitRows) -> dict[str, Any]:
        if unit.was_committed:
            return {"rows": unit.ref.rows, "written": False}
        return self._committer.commit(unit)

    def _result(self) -> dict[str, Any]:
        return self._committing.popleft().result() | {"spent": [self._watch.take()]}
