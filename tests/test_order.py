"""The order of training: every row once per epoch, the same global batches for any number of workers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raycnn.shards import Slice
from raycnn.shards.order import Cursor, copies, epoch_pieces, lanes_for, row_order, step_counts, steps_per_epoch


def groups_of(sizes: list[int]) -> list[Slice]:
    return [Slice("", f"data/{i}", 0, "", 0, rows, 0, 0, -1) for i, rows in enumerate(sizes)]


def visited(groups: list[Slice], seed: int, epoch: int, batch_size: int, lanes: int, workers: int, first: int = 0):
    """The rows of every step from `first` on, as a set of (group, row), taken the way a worker takes them."""
    rows = sum(g.rows for g in groups)
    steps: list[set[tuple[int, int]]] = [set() for _ in range(steps_per_epoch(rows, batch_size) - first)]
    cursor = Cursor(epoch, first)
    for rank in range(workers):
        owned = [lane for lane in range(lanes) if lane % workers == rank]
        waiting: dict[int, list[tuple[int, int]]] = {lane: [] for lane in owned}
        most, head = 10 * workers + 7, 3 * (workers // 2)
        pieces = iter(epoch_pieces(groups, seed, cursor, batch_size, lanes, owned, most, head))
        for step, seen in enumerate(steps, first):
            for lane, count in step_counts(rows, batch_size, lanes, owned, step):
                while len(waiting[lane]) < count:
                    piece = next(pieces)
                    order = row_order(groups[piece.group].rows, seed, epoch, piece.group)
                    waiting[piece.lane] += [(piece.group, int(r)) for r in order[piece.start : piece.stop]]
                taken, waiting[lane] = waiting[lane][:count], waiting[lane][count:]
                assert not seen.intersection(taken)
                seen.update(taken)
        assert next(pieces, None) is None
        assert not any(waiting.values())
    return steps


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_row_is_visited_once_and_batches_do_not_depend_on_the_number_of_workers(sizes, batch_size, seed, epoch):
    groups = groups_of(sizes)
    lanes = lanes_for(1)
    alone = visited(groups, seed, epoch, batch_size, lanes, 1)
    assert sum(len(step) for step in alone) == sum(sizes)
    assert set().union(*alone) == {(g, r) for g, rows in enumerate(sizes) for r in range(rows)}
    for workers in (2, 4, 8):
        assert visited(groups, seed, epoch, batch_size, lanes, workers) == alone


@pytest.mark.slow
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), batch_size=st.integers(1, 64), cut=st.floats(0, 1))
def test_a_run_that_is_cut_in_an_epoch_goes_on_with_the_next_step_on_any_number_of_workers(sizes, batch_size, cut):
    groups, lanes = groups_of(sizes), lanes_for(1)
    whole = visited(groups, 0, 1, batch_size, lanes, 1)
    first = int(cut * (len(whole) - 1))
    for workers in (1, 2, 8):
        assert visited(groups, 0, 1, batch_size, lanes, workers, first) == whole[first:]


def test_steps_are_as_even_as_rounding_lets_them_be():
    groups = groups_of([512, 512, 126])
    sizes = [len(step) for step in visited(groups, 0, 0, 64, 8, 2)]
    assert len(sizes) == 18
    assert max(sizes) - min(sizes) <= 2
    assert max(sizes) <= 65


def test_another_epoch_and_another_seed_give_another_order():
    groups = groups_of([100] * 5)
    first = visited(groups, 0, 0, 10, 8, 1)
    assert visited(groups, 0, 0, 10, 8, 1) == first
    assert visited(groups, 0, 1, 10, 8, 1) != first
    assert visited(groups, 1, 0, 10, 8, 1) != first


@pytest.mark.parametrize(("workers", "lanes"), [(1, 8), (2, 8), (3, 9), (8, 8), (16, 16)])
def test_workers_divide_the_lanes_of_a_new_run(workers, lanes):
    assert lanes_for(workers) == lanes


def test_a_sampler_shows_rare_classes_as_often_as_frequent_ones_and_as_many_rows_as_there_are():
    labels = [np.array([0] * 90 + [1] * 9 + [-1]), np.array([0] * 95 + [2] * 5)]
    seen = [copies(labels, 3, epoch) for epoch in range(50)]
    for times in seen:
        assert [len(n) for n in times] == [100, 100]
        assert sum(n.sum() for n in times) == 200
        assert times[0][-1] == 1  # has no label, and is counted
        visits = [sum(n[own == c].sum() for n, own in zip(times, labels, strict=True)) for c in range(3)]
        assert max(visits) - min(visits) <= 1
    assert (sum(n[0] for n in seen) > 0).sum() == 100  # over the epochs all are seen
    assert np.array_equal(np.concatenate(copies(labels, 3, 7)), np.concatenate(seen[7]))
