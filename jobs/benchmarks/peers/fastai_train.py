"""fastai, in the shape of its own course's notebook on images of this kind.

Source: fastai/fastai, dev_nbs/course/lesson7-resnet-mnist.ipynb (2022, read 2026-11), which trains on the 60,000 digits
of MNIST, 28 x 28 px: PNG files by `Datasets`, each padded to 34 px and cropped to 28, batches of 128; a small residual
network of about 41,000 weights; Adam and `fit_one_cycle(12, lr_max=0.05)`.

What is other here: the library's own `ResBlock`; as many epochs as the time allows, at least one, because a cycle has
to come to its end. How long an epoch takes is found beforehand, which does not count.
"""
# fastai, which is not installed everywhere, does not always do what its types say.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportFunctionMemberAccess=false

import time
from itertools import pairwise
from pathlib import Path

from fastai.vision.all import (
    Categorize,
    ConvLayer,
    CropPad,
    DataLoaders,
    Datasets,
    Flatten,
    GrandparentSplitter,
    IntToFloatTensor,
    Learner,
    Normalize,
    PadMode,
    PILImageBW,
    RandomCrop,
    ResBlock,
    ShortEpochCallback,
    ToTensor,
    accuracy,
    get_image_files,
    parent_label,
    set_seed,
)
from torch import nn

from benchmarks.peers import Training, predicted, told

BATCH, PEAK_RATE = 128, 0.05
WIDTHS = (1, 8, 16, 32, 16)
TRIED = 0.1
"""Share of an epoch from which its length is found."""


def loaders(task: Training) -> DataLoaders:
    """Training and validation images."""
    files = get_image_files(Path(task.images))
    splits = GrandparentSplitter(train_name="train", valid_name="val")(files)
    sets = Datasets(files, tfms=[[PILImageBW.create], [parent_label, Categorize]], splits=splits)
    each = [ToTensor(), CropPad(size=34, pad_mode=PadMode.Zeros), RandomCrop(size=28)]
    return sets.dataloaders(bs=BATCH, after_item=each, after_batch=[IntToFloatTensor(), Normalize()])


def learner(data: DataLoaders) -> Learner:
    """The notebook's network: five convolutions of stride 2, with a residual block after each but the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [ConvLayer(inputs, outputs, stride=2), ResBlock(1, outputs, outputs)]
    net = nn.Sequential(*layers, ConvLayer(WIDTHS[-1], len(data.vocab), stride=2), Flatten())
    return Learner(data, net, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)


def epoch_seconds(data: DataLoaders) -> float:
    """How long an epoch takes, from the second of two short ones."""
    trial, starts = learner(data), []
    with trial.no_bar(), trial.no_logging():
        for _ in range(2):
            starts.append(time.perf_counter())
            trial.fit(1, cbs=ShortEpochCallback(TRIED, short_valid=True))
    return (time.perf_counter() - starts[-1]) / TRIED


def main() -> None:
    """Train, predict."""
    task = told(Training)
    set_seed(task.seed)
    data = loaders(task)
    epochs = max(1, round(task.seconds / epoch_seconds(data)))
    set_seed(task.seed)
    learn = learner(data)
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter()
        learn.fit_one_cycle(epochs, lr_max=PEAK_RATE)
        seconds = time.perf_counter() - start
        files = sorted(Path(task.unseen).iterdir())
        votes, _ = learn.get_preds(dl=data.test_dl(files))
    best = votes.argmax(dim=1).tolist()
    names = {file.name: data.vocab[i] for file, i in zip(files, best, strict=True)}
    predicted(names, epochs, seconds, sum(p.numel() for p in learn.model.parameters()))


if __name__ == "__main__":
    main()
