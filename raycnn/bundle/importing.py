"""`raycnn import`: a bundle from a known architecture and its weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raycnn import models
from raycnn.bundle.folder import CONFIG, check_names, save
from raycnn.config import GRAY_MEAN, GRAY_STD, ImageSpec, ImportConfig
from raycnn.errors import ConfigError
from raycnn.storage import open_store


@dataclass(frozen=True)
class ImportReport:
    """What `import_model` made: where, how large, and how many images its self-test has."""

    bundle: str
    parameters: int
    selftest: int


def import_model(config: ImportConfig) -> ImportReport:
    """Make a bundle from an architecture, its weights and its class names.

    The image spec is the one that the weights' publisher states for the architecture: torchvision's for the very
    file, where its name gives that away, else for its recommended weights. `image_size` overrides the size only
    where it is set. Weights of grayscale models are recognised by their first convolution.

    Raises:
        ConfigError: unknown architecture, weights name or classes; or the destination holds another bundle.
        BundleError: the weights do not fit the architecture or the number of classes.
        StorageError: weights or classes cannot be read.
    """
    recipe = config.model_dump(mode="json")
    _refuse_another(config.dst, recipe)
    names = _class_names(config.classes)
    spec = _spec(config)
    state = models.load_weights(config.model, config.weights)
    classifier = models.blank(config.model, len(names), spec)
    if models.channels_in(classifier, state) == 1:
        gray = {"channels": 1, "mean": GRAY_MEAN, "std": GRAY_STD}
        classifier = models.blank(config.model, len(names), spec.model_copy(update=gray))
    models.fill(classifier, state, config.weights)
    bundle = save(
        config.dst,
        classifier,
        names,
        temperature=1.0,
        metrics={},
        validation={},
        samples=(),
        data_fingerprint=None,
        recipe=recipe,
    )
    return ImportReport(bundle.url, bundle.config["parameters"], len(bundle.selftest.pixels))


def _refuse_another(url: str, recipe: Mapping[str, Any]) -> None:
    """Only the same command again may write where a bundle is."""
    store = open_store(url)
    if store.head(CONFIG) is None:
        return
    try:
        found = json.loads(store.get(CONFIG))
    except ValueError:
        found = {}
    if not (found.get("incomplete") or found.get("recipe") == recipe):
        raise ConfigError(f"{url} holds another {CONFIG} already; choose another destination")


def _class_names(source: str) -> tuple[str, ...]:
    if source == "imagenet":
        return models.published("resnet18")[0].class_names
    try:
        lines = models.read_file(source).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"classes: {source} is not UTF-8 text with one class name a line") from None
    names = tuple(line.strip() for line in lines)
    while names and not names[-1]:
        names = names[:-1]
    if not names or "" in names:
        where = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise ConfigError(f"classes: {source} needs one class name a line, but {where}")
    check_names(names, len(names))
    return names


def _spec(config: ImportConfig) -> ImageSpec:
    """The image spec that goes with the weights, at the size that was asked for, if any."""
    known, size = models.published_spec(config.model, config.weights), config.image_size
    if known is not None and "image_size" not in config.model_fields_set:
        return known
    return (known or ImageSpec()).model_copy(update={"height": size, "width": size})
