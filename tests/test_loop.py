"""Steps and evaluation: the same numbers on any number of processes, and after any interruption."""

from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from raycnn import loop
from raycnn.config import ImageSpec, TrainConfig, make
from raycnn.errors import ConfigError, DataError
from raycnn.loop import Batch, Trainer, evaluate
from raycnn.metrics import Metrics
from raycnn.models import Classifier, build

pytestmark = pytest.mark.slow  # the first optimizer imports torch._dynamo, which takes seconds

SPEC = ImageSpec(height=8, width=8, channels=1, crop=1.0, mean=(0.45,), std=(0.22,))
CLASSES = 3
ROWS = 37
SHARES = {1: [20], 2: [0, 20], 3: [13, 0, 7]}
"""Rows of each rank in one step, of which one has none."""


def config(**more: Any) -> TrainConfig:
    return make(TrainConfig, {"data": "d", "run": "r", "optimizer": "sgd", "learning_rate": 0.1, "warmup": 0} | more)


def images(rows: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, 8, 8, 1), dtype=torch.uint8, generator=draw)
    return Batch(pixels, torch.randint(0, CLASSES, (rows,), generator=draw))


def part(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(batch.pixels[start:stop], batch.labels[start:stop])


def classic() -> Classifier:
    return build("classic", CLASSES, SPEC, seed=0)


def restless() -> Classifier:
    """A model with what makes resuming hard: batch normalisation and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(288, CLASSES)
    return Classifier("restless", nn.Sequential(*layers), SPEC, CLASSES)


# -- several processes ------------------------------------------------------------------------------------------


def several(rank: int, folder: Path) -> None:
    """What each of three processes does: all of it alone, then as two, then as three."""
    torch.set_num_threads(1)
    for world, shares in SHARES.items():
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
        rows = images(ROWS)
        mine = part(rows, rank * ROWS // world, (rank + 1) * ROWS // world)
        batches = [part(mine, at, at + 5) for at in range(0, len(mine.labels), 5)]
        made: dict[str, Tensor] = {"counts": evaluate(classic(), batches, CLASSES).to_vector()}
        whole, start = images(sum(shares), seed=1), sum(shares[:rank])
        share = part(whole, start, start + shares[rank])
        for name, model in (("classic", classic()), ("restless", restless())):
            wrapped = DistributedDataParallel(model) if world > 1 else model
            loss, count = Trainer(wrapped, config(), 10).step(share, 0)
            made |= {f"{name}.{k}": v for k, v in model.state_dict().items()}
            made[f"{name}.loss"] = torch.tensor([loss, count], dtype=torch.float64)
        made["restless.counts"] = evaluate(model, batches, CLASSES).to_vector()
        torch.save(made, folder / f"{world}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[tuple[int, int], dict[str, Tensor]]:
    """What every rank of every number of processes got."""
    folder = tmp_path_factory.mktemp("ranks")
    set_forkserver_preload(["torch._dynamo", "raycnn.loop", "raycnn.models"])  # imported once, not by each of them
    start_processes(several, args=(folder,), nprocs=3, start_method="forkserver")
    return {(w, r): torch.load(folder / f"{w}-{r}.pt", weights_only=True) for w in SHARES for r in range(w)}


@pytest.mark.parametrize("world", SHARES)
def test_evaluation_counts_every_row_once_on_any_number_of_processes(ranks, world):
    alone = evaluate(classic(), [images(ROWS)], CLASSES)
    assert alone.rows == ROWS
    for rank in range(world):
        found = Metrics.from_vector(ranks[world, rank]["counts"], CLASSES)
        assert torch.equal(found.confusion, alone.confusion)
        assert found.accuracy_top5 == alone.accuracy_top5
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)
        assert found.ece == pytest.approx(alone.ece, rel=1e-6)


@pytest.mark.parametrize("world", SHARES)
def test_a_step_is_that_of_the_whole_batch_however_it_is_spread(ranks, world):
    model = classic()
    loss, count = Trainer(model, config(), 10).step(images(20, seed=1), 0)
    assert sum(ranks[world, r]["classic.loss"] for r in range(world)).tolist() == pytest.approx([loss, count], rel=1e-5)
    for rank in range(world):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(ranks[world, rank][f"classic.{name}"], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("world", "empty"), [(2, 0), (3, 1)])
def test_a_rank_without_rows_teaches_batch_normalisation_nothing(ranks, world, empty):
    untouched = restless().net.get_buffer("1.running_mean")
    for rank in range(world):
        learned = ranks[world, rank]["restless.net.1.running_mean"]
        assert torch.equal(learned, ranks[world, 0]["restless.net.1.running_mean"])
    assert torch.equal(learned, untouched) == (empty == 0)


@pytest.mark.parametrize("world", SHARES)
def test_ranks_count_with_the_running_statistics_of_rank_0(ranks, world):
    model = restless()
    state = {k: ranks[world, 0][f"restless.{k}"] for k in model.state_dict()}
    model.load_state_dict(state)
    expected = evaluate(model, [images(ROWS)], CLASSES)
    found = Metrics.from_vector(ranks[world, world - 1]["restless.counts"], CLASSES)
    assert torch.equal(found.confusion, expected.confusion)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


# -- one process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_goes_on_bit_for_bit(optimizer):
    settings = config(optimizer=optimizer)
    through, stopped, resumed = restless(), restless(), restless()
    whole = Trainer(through, settings, 6)
    for step in range(6):
        whole.step(images(16, step), step)
    first = Trainer(stopped, settings, 6)
    for step in range(3):
        first.step(images(16, step), step)
    stored = load(save(loop.pack_state(stopped, first.optimizer)))
    torch.rand(7)  # a new process has drawn other numbers
    second = Trainer(resumed, settings, 6)
    loop.unpack_state(stored, resumed, second.optimizer)
    for step in range(3, 6):
        second.step(images(16, step), step)
    expected, found = (loop.pack_state(m, t.optimizer) for m, t in ((through, whole), (resumed, second)))
    assert expected.keys() == found.keys()
    assert [k for k in expected if not torch.equal(expected[k], found[k])] == []


def test_dropout_differs_from_step_to_step_and_leaves_other_random_numbers_alone():
    model, batch, before = restless(), images(16), torch.get_rng_state()
    frozen = Trainer(model, config(learning_rate=1e-30), 10)
    losses = [frozen.step(batch, step)[0] for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    settings = config(learning_rate=1.0, warmup=0.1)
    rates = [loop.learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert loop.learning_rate(config(learning_rate=1.0), 0, 1) == 1.0


def test_biases_and_normalisation_are_not_decayed():
    model = restless()
    before = {k: v.clone() for k, v in model.named_parameters()}
    Trainer(model, config(optimizer="adamw", weight_decay=0.5), 10).step(images(0), 0)
    decayed = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert decayed == {"net.0.weight", "net.5.weight"}
    torch.testing.assert_close(model.net[5].weight, before["net.5.weight"] * (1 - 0.1 * 0.5))


def test_a_loss_that_is_not_finite_stops_the_run_before_a_weight_is_changed():
    model = classic()
    with torch.no_grad():
        model.net.fc.bias[0] = torch.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match=r"the loss is nan at step 4; lower --learning-rate \(now 0\.1\)"):
        Trainer(model, config(), 10).step(images(8), 4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "net.fc.bias")
    with pytest.raises(DataError, match="votes are not finite; lower --learning-rate"):
        evaluate(model, [images(8)], CLASSES)


def test_a_batch_that_batch_normalisation_cannot_learn_from_is_a_matter_of_configuration():
    layers = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(1), nn.Linear(1, CLASSES)
    model = Classifier("tiny", nn.Sequential(*layers), SPEC, CLASSES)
    with pytest.raises(ConfigError, match="batch_size: 64 leaves a worker a single image"):
        Trainer(model, config(), 10).step(images(1), 0)
