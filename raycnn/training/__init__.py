"""`raycnn train`: data-parallel training with Ray Train over packed shards that Ray Data streams.

A run folder holds all that a run needs to go on: the same command again resumes it after any death, and finds
nothing to do when it is finished.

    config.yaml                     what was asked for: a recipe
    run.json                        what the run is bound to: its data and its lanes
    checkpoints/slot-N.safetensors  model, optimizer, validation counts; slot-N.json is its marker, written last
    metrics.jsonl, tensorboard/     one line, one point for each epoch
    bad.jsonl                       the training images that cannot be read
    pictures/                       curves, learned filters, confusion, mistakes, as PNGs
    bundle/                         the best epoch's model
"""

from raycnn.training.folder import PICTURES, Checkpoints, repeat_command
from raycnn.training.start import RateReport, TrainReport, find_rate, train

__all__ = ["PICTURES", "Checkpoints", "RateReport", "TrainReport", "find_rate", "repeat_command", "train"]
