"""What a run's model is given, worked out from the data; without torch, which takes seconds to import, if it can be."""

from typing import Any

from raycnn.config import GRAY_MEAN, GRAY_STD, ImageSpec, TrainConfig
from raycnn.errors import ConfigError, DataError

SMALL_SIDE = 64
"""Images that are all of one size up to this side are trained on as they are."""


def image_spec(config: TrainConfig, manifest: dict[str, Any]) -> ImageSpec:
    """The model's input, from the data: small equal images as they are, others cropped to a square.

    Raises:
        DataError: no image can be read.
    """
    seen = manifest["images"]
    if not seen["channels"]:
        raise DataError("not one of the packed images can be read, so there is nothing to train on")
    known = _published_spec(config)
    if _channels(config, seen) == 1:
        colours: dict[str, Any] = {"channels": 1, "mean": GRAY_MEAN, "std": GRAY_STD}
    else:
        colours = (known or ImageSpec()).model_dump(include={"channels", "mean", "std"})
    (low_h, high_h), (low_w, high_w) = seen["height"], seen["width"]
    if config.image_size != "auto":
        return ImageSpec(height=config.image_size, width=config.image_size, **colours)
    if low_h == high_h and low_w == high_w and max(high_h, high_w) <= SMALL_SIDE:
        return ImageSpec(height=high_h, width=high_w, crop=1.0, **colours)
    return (known or ImageSpec()).model_copy(update=colours)


def _published_spec(config: TrainConfig) -> ImageSpec | None:
    if config.weights is None:
        return None
    from raycnn.models import published_spec

    return published_spec(config.model, config.weights)


def _channels(config: TrainConfig, seen: dict[str, Any]) -> int:
    """1 or 3: those of the weights to start from, else those of the data, which are 1 only if all of it is gray."""
    if config.weights is None:
        return 1 if set(seen["channels"]) == {"1"} else 3
    from raycnn.models import blank, channels_in, is_published_name, load_weights

    if is_published_name(config.weights):
        return 3
    state = load_weights(config.model, config.weights)
    return channels_in(blank(config.model, 2, ImageSpec()), state)


def check_grows(config: TrainConfig, spec: ImageSpec) -> None:
    """Progressive resizing is for models that take images of any size."""
    side = min(spec.height, spec.width)
    if config.start_size > side:
        raise ConfigError(f"start_size: {config.start_size} is more than the images' side of {side} px; choose less")
    if not config.start_size:
        return
    from raycnn.models import takes_size

    if not takes_size(config.model, spec, config.start_size):
        raise ConfigError(
            f"start_size: {config.model} takes images of {spec.height} x {spec.width} px only, so they cannot grow; "
            "choose another model, or 0"
        )
