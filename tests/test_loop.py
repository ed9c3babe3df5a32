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
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from raycnn import loop
from raycnn.config import ImageSpec, TrainConfig, make
from raycnn.errors import ConfigError, DataError
from raycnn.loop import Batch, Told, Trainer, evaluate
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
    labels = torch.randint(0, CLASSES, (rows,), generator=draw)
    return Batch(pixels, labels, torch.arange(rows) + 1000 * seed, torch.zeros(rows, dtype=torch.int64))


def part(batch: Batch, start: int, stop: int) -> Batch:
    pixels, labels, keys, lanes, _ = batch
    return Batch(pixels[start:stop], labels[start:stop], keys[start:stop], lanes[start:stop])


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
            done = Trainer(model, config(), 10, wrapped).step(share, 0, told=Told(0.25 * (rank == 0), 0.0))
            made |= {f"{name}.{k}": v for k, v in model.state_dict().items()}
            made[f"{name}.loss"] = torch.tensor([done.loss, done.rows, done.done], dtype=torch.float64)
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
    done = Trainer(model, config(), 10).step(images(20, seed=1), 0, told=Told(0.25, 0.0))
    found = torch.stack([ranks[world, r]["classic.loss"] for r in range(world)])
    assert found[:, :2].sum(0).tolist() == pytest.approx([done.loss, done.rows], rel=1e-5)
    assert found[:, 2].tolist() == [0.25] * world == [done.done] * world
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


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "ema": 0.9, "schedule": "one-cycle"},
        {"optimizer": "adamw", "flip": True, "shift": 2, "erase": 0.5, "mixup": 0.2, "cutmix": 1.0},
    ],
)
@pytest.mark.parametrize("make", [restless, classic])
def test_a_resumed_run_goes_on_bit_for_bit(make, more):
    settings = config(**more)
    through, stopped, resumed = (make().to(memory_format=torch.channels_last) for _ in range(3))
    whole = Trainer(through, settings, 6)
    for step in range(6):
        whole.step(images(16, step), step)
    first = Trainer(stopped, settings, 6)
    for step in range(3):
        first.step(images(16, step), step)
    stored = load(save(first.state()))
    torch.rand(7)  # a new process has drawn other numbers
    second = Trainer(resumed, settings, 6)
    second.restore(stored)
    for step in range(3, 6):
        second.step(images(16, step), step)
    expected, found = whole.state(), second.state()
    assert expected.keys() == found.keys()
    assert [k for k in expected if not torch.equal(expected[k], found[k])] == []


def test_dropout_differs_from_step_to_step_and_leaves_other_random_numbers_alone():
    model, batch, before = restless(), images(16), torch.get_rng_state()
    frozen = Trainer(model, config(learning_rate=1e-30), 10)
    losses = [frozen.step(batch, step).loss for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    settings = config(learning_rate=1.0, warmup=0.1)
    rates = [loop.learning_rate(settings, (step + 0.5) / 100) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 10 - 0.05 for k in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert loop.learning_rate(settings, 0.1) == 1.0
    assert loop.learning_rate(settings, 0.55) == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001
    straight = config(learning_rate=1.0, schedule="linear", warmup=0.1)
    assert [loop.learning_rate(straight, d) for d in (0.05, 0.1, 0.325, 1)] == pytest.approx([0.5, 1, 0.75, 0])


def test_one_cycle_lowers_the_momentum_while_the_rate_is_high():
    settings = config(learning_rate=1.0, schedule="one-cycle", warmup=0.25)
    assert [loop.learning_rate(settings, d) for d in (0, 0.125, 0.25, 1)] == pytest.approx([0.04, 0.52, 1, 0])
    assert [loop.momentum(settings, d) for d in (0.25, 1)] == pytest.approx([0.85, 0.95])
    trainer = Trainer(classic(), settings, 4)
    trainer.step(images(8), 0)
    assert [g["momentum"] for g in trainer.optimizer.param_groups] == [pytest.approx(0.898)] * 2


def test_a_run_that_has_a_time_ends_its_schedule_then():
    trainer = Trainer(classic(), config(warmup=0, learning_rate=1.0), 1000)
    assert trainer.step(images(8), 0, told=Told(0.5, 0)).done == 0.5
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    assert trainer.step(images(8), 900, told=Told(0.5, 0)).done == pytest.approx(0.9005)  # whichever comes first


def test_an_accumulated_step_is_that_of_the_whole_batch():
    whole, parts = classic(), classic()
    for model, count in ((whole, 1), (parts, 3)):
        Trainer(model, config(accumulate=count, clip_norm=0.1), 4).step(images(20), 0)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_a_clipped_step_is_as_long_as_the_longest_gradient_at_most():
    model = classic()
    before = [p.detach().clone() for p in model.parameters()]
    settings = config(clip_norm=0.01, learning_rate=1.0, weight_decay=0.0)
    Trainer(model, settings, 10**6).step(images(20), 0)
    moved = sum(((p - q) ** 2).sum() for p, q in zip(model.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1.9 * 0.01, rel=1e-3)  # Nesterov's first step is 1 + 0.9 times the gradient


def test_the_average_is_what_is_evaluated_and_lags_behind_the_weights():
    model = restless()
    trainer = Trainer(model, config(ema=0.5), 10)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trainer.step(images(16), 0)
    for name, value in trainer.evaluated.state_dict().items():
        if value.is_floating_point():  # at first the average takes nine tenths of the new weights
            torch.testing.assert_close(value, start[name] + 0.9 * (model.state_dict()[name] - start[name]))
    assert trainer.evaluated is not model
    assert Trainer(model, config(), 10).evaluated is model


def test_a_frozen_model_learns_in_its_last_layer_only():
    model = restless()
    model.freeze()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = Trainer(model, config(), 10)
    for step in range(2):
        model.train()
        trainer.step(images(16), step)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"net.5.weight", "net.5.bias"}


def test_layers_near_the_image_learn_slower():
    model = classic()
    trainer = Trainer(model, config(layer_decay=0.5), 10)
    scale = {id(p): g["scale"] for g in trainer.optimizer.param_groups for p in g["params"]}
    scales = [scale[id(p)] for name, p in model.named_parameters() if name.endswith("weight")]
    assert scales == sorted(scales)
    assert scales[-1] == 1.0
    assert scales[0] < scales[-1]


def test_rare_classes_count_more():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2])
    batch = Batch(images(100).pixels, labels, torch.arange(100), torch.zeros(100, dtype=torch.int64))
    by_weights = Trainer(classic(), config(imbalance="weights"), 10, class_counts=[90, 9, 1])
    usual = Trainer(classic(), config(), 10).step(batch, 0).loss
    assert by_weights.step(batch, 0).loss == pytest.approx(usual, rel=0.5)  # the weights are 1 on average
    single = Batch(batch.pixels[-1:], labels[-1:], batch.keys[-1:], batch.lanes[-1:])
    ratio = [
        Trainer(classic(), config(imbalance=kind), 10, class_counts=[90, 9, 1]).step(single, 0).loss
        for kind in ("none", "weights", "logit-adjust")
    ]
    assert ratio[1] == pytest.approx(ratio[0] * 100 / 3, rel=1e-5)
    assert ratio[2] > ratio[0]


def unlike(rows: int, share: float, seed: int) -> Batch:
    """Noise, of which the rare class 1 is somewhat brighter: no model can tell all of it apart."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=draw) < share).long()
    noise = torch.randn((rows, 8, 8, 1), generator=draw) * 30 + torch.randn((rows, 1, 1, 1), generator=draw) * 20
    pixels = (110 + noise + 30 * labels[:, None, None, None]).clamp(0, 255).byte()
    return Batch(pixels, labels, torch.arange(rows), torch.zeros(rows, dtype=torch.int64))


def recalls(kind: str) -> list[float]:
    """The shares of each class that a model finds which has seen 5% of the rare one."""
    model = build("classic", 2, SPEC, seed=0)
    trainer = Trainer(model, config(imbalance=kind, learning_rate=0.05), 80, class_counts=[950, 50])
    for step in range(80):
        trainer.step(unlike(64, 0.05, step), step)
    found = evaluate(model, [unlike(2000, 0.5, 1000)], 2).confusion
    return (found.diagonal() / found.sum(1)).tolist()


def test_what_is_done_against_imbalance_finds_more_of_the_rare_class():
    frequent, rare = recalls("none")
    assert frequent > 0.95
    assert rare < 0.5
    for kind in ("weights", "logit-adjust"):
        of_frequent, of_rare = recalls(kind)
        assert of_rare > rare + 0.2
        assert of_frequent + of_rare > frequent + rare


def test_progressive_resizing_begins_small_and_ends_at_the_full_size():
    model = build("resnet18", CLASSES, ImageSpec(height=224, width=224), seed=0)
    settings = config(start_size=128)
    sides = [loop.training_size(settings, model, d / 100)[0] for d in range(101)]
    assert sides[0] == 128
    assert sides == sorted(sides)
    assert set(sides) == {128, 160, 192, 224}
    assert sides[67:] == [224] * 34


def _loss_after(model: Classifier, rate: float) -> float:
    trainer = Trainer(model, config(learning_rate=rate), 40)
    return [trainer.step(unlike(64, 0.5, seed), seed).loss for seed in range(40)][-1]


def test_a_range_test_suggests_a_rate_at_which_the_loss_falls():
    batches = [unlike(64, 0.5, seed) for seed in range(100)]
    found = loop.range_test(Trainer(build("classic", 2, SPEC, seed=0), config(), 100), batches, 100)
    assert found.rates == sorted(found.rates)
    assert 1e-4 < found.suggestion < 1
    at = min(range(len(found.rates)), key=lambda i: abs(found.rates[i] - found.suggestion))
    assert min(found.losses) < found.losses[at] < found.losses[0]
    usual, suggested = (_loss_after(build("classic", 2, SPEC, seed=0), rate) for rate in (1e-4, found.suggestion))
    assert suggested < usual
    nothing = loop.Batch(*(part[:0] for part in images(1)[:4]))
    gaps = [batch for pair in zip(batches, [nothing] * 100, strict=True) for batch in pair]
    assert len(loop.range_test(Trainer(classic(), config(), 100), gaps, 100).rates) <= 50
    with pytest.raises(DataError, match="needs at least 20 steps in an epoch, and had 5"):
        loop.range_test(Trainer(classic(), config(), 100), batches[:5], 100)


def test_smoothed_labels_are_those_of_torch():
    model, batch = classic(), images(16)
    expected = cross_entropy(model(batch.pixels), batch.labels, label_smoothing=0.2, reduction="sum")
    done = Trainer(model, config(label_smoothing=0.2), 10).step(batch, 0)
    assert done.loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_time_of_a_step_is_told_apart():
    trainer = Trainer(classic(), config(), 10)
    trainer.clock.begin()
    trainer.step(images(16), 0)
    spent = trainer.clock.take()
    assert spent.keys() >= {"data", "augment", "forward", "backward", "optimizer"}
    assert trainer.clock.take() == {}


def test_biases_and_normalisation_are_not_decayed():
    model = restless()
    before = {k: v.clone() for k, v in model.named_parameters()}
    settings = config(optimizer="adamw", weight_decay=0.5)
    Trainer(model, settings, 10).step(images(0), 0)
    decayed = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert decayed == {"net.0.weight", "net.5.weight"}
    rate = loop.learning_rate(settings, 0.05)
    torch.testing.assert_close(model.net[5].weight, before["net.5.weight"] * (1 - rate * 0.5))


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
