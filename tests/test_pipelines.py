"""How work is handed out to workers."""

import json
from itertools import pairwise

import pytest

from raycnn.data.pipelines import MAX_BATCH, MAX_BLOCKS, waves


@pytest.mark.parametrize(("count", "workers"), [(1, 2), (12, 2), (48, 2), (1000, 64), (100_000, 3)])
def test_every_item_is_handed_out_once_in_batches_that_become_smaller(count: int, workers: int):
    items = [{"unit": i} for i in range(count)]
    executions = list(waves(items, workers))
    batches = [json.loads(row["items"]) for rows in executions for row in rows]
    assert [item for batch in batches for item in batch] == items
    assert [row["number"] for rows in executions for row in rows] == [batch[0]["unit"] for batch in batches]
    assert max(map(len, executions)) <= MAX_BLOCKS
    sizes = list(map(len, batches))
    assert max(sizes) <= MAX_BATCH
    assert all(a >= b for a, b in pairwise(sizes))
    assert sizes[-1] == 1


def test_a_short_run_is_two_batches_for_each_worker():
    (rows,) = waves([{"unit": i} for i in range(12)], 2)
    assert [len(json.loads(row["items"])) for row in rows] == [5, 5, 1, 1]
