"""Weights: from a file, a bucket, or whoever publishes them."""

import contextlib
import io
import pickle
import re
import struct
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raycnn.config import ImageSpec, absolute, nearest
from raycnn.errors import BundleError, ConfigError, ObjectMissing, StorageError
from raycnn.models.architectures import OWN, TIMM, checked, checked_timm, import_timm, timm_spec
from raycnn.storage import file_at

# What torch.load raises for files that are no state dict: seen with 30,000 mutated ones.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)

_PUBLISHED_NAME = re.compile(r"(?:\w+_Weights\.)?([A-Z][A-Z0-9_]*)")


class Published(NamedTuple):
    """What torchvision says of one set of weights that it publishes."""

    name: str
    url: str
    spec: ImageSpec
    class_names: tuple[str, ...]


def published(name: str) -> list[Published]:
    """The weights that torchvision publishes for an architecture, the recommended one first; [] for others.

    googlenet and inception_v3 were trained on pixels in [-1, 1], which torchvision hides in a
    `transform_input` flag; here that is their mean and std.
    """
    if name in OWN or name.startswith(TIMM):
        return []
    from torchvision.models import get_model_weights

    known = get_model_weights(checked(name))
    entries = sorted(known, key=lambda entry: entry != known.DEFAULT)  # pyright: ignore[reportAttributeAccessIssue]
    return [_published(name, entry) for entry in entries if entry.meta.get("categories")]


def published_spec(name: str, weights: str) -> ImageSpec | None:
    """The image spec that goes with weights, told by their name or their file's; None where nobody publishes any.

    A file that cannot be told is taken for one of the architecture's recommended weights.
    """
    if name.startswith(TIMM):
        return timm_spec(name)
    wanted = weights.rpartition(".")[2] if is_published_name(weights) else None
    leaf = weights.partition("?")[0].rpartition("/")[2]
    known = published(name)
    told = (p for p in known if p.name == wanted or p.url.endswith(f"/{leaf}"))
    return next((p.spec for p in (*told, *known)), None)


def _published(name: str, entry: Any) -> Published:
    preset = entry.transforms()
    half = (0.5, 0.5, 0.5)
    shifted = name in ("googlenet", "inception_v3")
    size, resized = preset.crop_size[0], preset.resize_size[0]
    spec = ImageSpec(
        height=size,
        width=size,
        crop=size / resized,
        mean=half if shifted else tuple(preset.mean),
        std=half if shifted else tuple(preset.std),
    )
    names = tuple(entry.meta["categories"])
    return Published(entry.name, entry.url, spec, names)


def is_published_name(weights: str) -> bool:
    """Whether `weights` is a name such as DEFAULT or ResNet50_Weights.IMAGENET1K_V2, rather than a file."""
    return _PUBLISHED_NAME.fullmatch(weights) is not None


def load_weights(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict in `weights`: a file, local or s3://, or a name published for the architecture."""
    if not is_published_name(weights):
        return read_weights(weights)
    if name in OWN:
        raise ConfigError(f"weights: nobody publishes {weights} for {name}; give a .safetensors file")
    return _timm_weights(name, weights) if name.startswith(TIMM) else _download(name, weights)


def read_weights(url: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict (torch.save), which is read with weights_only.

    Raises:
        BundleError: the file is neither.
        StorageError: it cannot be read.
    """
    return parse_weights(read_file(url), url)


def read_file(url: str) -> bytes:
    """The bytes of one file, local or s3://."""
    store, leaf = file_at(url)
    return store.get(leaf)


def require_file(url: str) -> str:
    """The URL, a local path made absolute, of one file that exists.

    Raises:
        ObjectMissing: it does not.
        StorageError: the store cannot be asked.
    """
    store, leaf = file_at(url)
    if store.head(leaf) is None:
        raise ObjectMissing(f"{store.address(leaf)}: no file is there; of a bundle, name its model.safetensors")
    return absolute(url)


def parse_weights(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a .safetensors file or a state dict; `source` names them in errors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if source.partition("?")[0].endswith(".safetensors"):
        try:
            return load(data)
        except SafetensorError as error:
            raise BundleError(f"{source} is not a readable .safetensors file: {error}") from None
        except KeyError as error:  # a type that the file may have, and safetensors no tensor for
            raise BundleError(f"{source} has weights of type {error.args[0]}; save them as F32") from None
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(
            f"{source} is not a state dict that loads with weights_only ({cause}); save model.state_dict()"
        ) from None
    return _unwrapped(content, source)


def _unwrapped(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without the prefix that data-parallel wrappers add."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise BundleError(f"{source} holds no state dict; save model.state_dict()")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def _download(name: str, weights: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    known: dict[str, Any] = dict(get_model_weights(checked(name)).__members__)
    match = _PUBLISHED_NAME.fullmatch(weights)
    entry = known.get(match[1] if match else weights)
    if entry is None:
        raise ConfigError(
            f"weights: torchvision publishes no {weights} for {name}{nearest(weights, known)}; "
            f"there is {', '.join(known)}"
        )
    try:
        # torch.hub announces a download on standard output, which is for results.
        with contextlib.redirect_stdout(sys.stderr):
            return entry.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"cannot download the weights {entry.name} of {name} from {entry.url}: {error}; "
            f"fetch that file elsewhere and give its path as the weights"
        ) from None


def _timm_weights(name: str, weights: str) -> dict[str, Tensor]:
    timm = import_timm()
    if weights != "DEFAULT":
        raise ConfigError(f"weights: timm knows only DEFAULT here, not {weights}; tags belong to the model's name")
    model = checked_timm(timm, name)
    from huggingface_hub.errors import HfHubHTTPError  # pyright: ignore[reportMissingImports]

    try:
        return timm.create_model(model, pretrained=True).state_dict()
    except (OSError, RuntimeError, HfHubHTTPError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(
            f"cannot download the weights of {name} from the Hugging Face Hub: {cause}; "
            f"fetch model.safetensors elsewhere and give its path as the weights"
        ) from None
