"""The zoo: `classic`, `residual`, torchvision's classification models, timm's; all behind one `Classifier`.

A Classifier takes uint8 pixels as they leave `raycnn.images` and normalises them itself, so mean and std
cannot be forgotten or applied twice. torchvision takes seconds to import, so that waits until one of its models
is asked for.
"""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raycnn.config import ImageSpec
from raycnn.errors import BundleError, ConfigError
from raycnn.models.architectures import (
    OWN,
    TIMM,
    architectures,
    check_name,
    first_conv,
    head,
    network,
    timm_spec,
    wrong_size,
)
from raycnn.models.weights import (
    Published,
    is_published_name,
    load_weights,
    parse_weights,
    published,
    published_spec,
    read_file,
    require_file,
)

__all__ = [
    "TIMM",
    "Classifier",
    "Published",
    "architectures",
    "blank",
    "build",
    "channels_in",
    "check_name",
    "count_parameters",
    "feature_maps",
    "fill",
    "first_filters",
    "is_published_name",
    "load_weights",
    "parse_weights",
    "published",
    "published_spec",
    "read_file",
    "require_file",
    "takes_size",
    "timm_spec",
]

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


class Classifier(nn.Module):
    """An architecture with its input: uint8 pixels in, logits out."""

    _scale: Tensor
    _shift: Tensor
    is_frozen = False
    """Whether only the last layer learns."""

    def __init__(self, name: str, net: nn.Module, spec: ImageSpec, num_classes: int) -> None:
        """Wrap `net`, which takes normalised (N, C, H, W) floats; its key names stay its own."""
        super().__init__()
        self.name, self.net, self.spec, self.num_classes = name, net, spec, num_classes
        # (x / 255 - mean) / std as two operations: at 224 px the three cost a small CNN some 7% of its time.
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (spec.mean, spec.std))
        for key, values in (("_scale", 1 / (255 * std)), ("_shift", mean / std)):
            self.register_buffer(key, values.float().view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, num_classes) for uint8 pixels (N, H, W, C); float32 unless autocast says otherwise."""
        x = pixels.permute(0, 3, 1, 2).to(self._scale.dtype, memory_format=torch.channels_last)
        return self.net(x * self._scale - self._shift)

    def freeze(self) -> None:
        """From now on only the layer that casts the votes learns; all others, statistics too, stay as they are."""
        self.is_frozen = True
        self.requires_grad_(False)
        self._head().requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which frozen layers predict."""
        super().train(mode)
        if self.is_frozen:
            self.net.eval()
            self._head().train(mode)
        return self

    def votes_and_embeddings(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, num_classes) for uint8 pixels (N, H, W, C), and the embeddings (N, D) that decide them.

        Embeddings are what the layer that casts the votes is given; maps are averaged over rows and columns.
        """
        given: list[Tensor] = []
        hook = self._head().register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
        try:
            logits = self(pixels)
        finally:
            hook.remove()
        embeddings = given[-1]
        return logits, embeddings.mean(dim=(2, 3)) if embeddings.ndim == 4 else embeddings

    @property
    def embedding_size(self) -> int:
        """D of the embeddings (N, D)."""
        return self._head().weight.shape[1]  # pyright: ignore

    def _head(self) -> nn.Module:
        return self.net.get_submodule(head(self.name, self.net))


def build(
    name: str, num_classes: int, spec: ImageSpec, weights: str | None = None, *, seed: int | None = None
) -> Classifier:
    """A classifier to train, on the CPU, in training mode.

    With a `seed` the initial weights depend on it alone and torch's global generator is left as it was;
    without one they are drawn from that generator. With `weights` (a .safetensors file, a state dict, or a
    published name such as DEFAULT) the model starts from those; a head for another number of classes is left
    out and starts fresh, and a first convolution over RGB is summed up when the images are grayscale.

    Raises:
        ConfigError: unknown architecture or weights name, or an image size that the architecture cannot take.
        BundleError: the weights do not fit; names the first difference.
        StorageError: the weights cannot be read or downloaded.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        classifier = Classifier(name, network(name, num_classes, spec), spec, num_classes)
        if weights is not None:
            fill(classifier, load_weights(name, weights), weights, new_head=True)
    _try_out(classifier)
    return classifier


def blank(name: str, num_classes: int, spec: ImageSpec) -> Classifier:
    """A classifier whose weights are undefined memory until `fill`; for vit_l_16 0.1 s instead of 8 s."""
    with _NoInit():
        return Classifier(name, network(name, num_classes, spec), spec, num_classes)


def takes_size(name: str, spec: ImageSpec, side: int) -> bool:
    """Whether a model that is made for the size of `spec` also takes images of side x side px."""
    model = blank(name, 2, spec).eval()
    try:
        with torch.no_grad():
            model(torch.zeros((1, side, side, spec.channels), dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def fill(classifier: Classifier, state: Mapping[str, Tensor], source: str, *, new_head: bool = False) -> None:
    """Copy `state` into the classifier's architecture: every weight, or none is trusted.

    With `new_head`, a head for another number of classes keeps its own values. Auxiliary heads of googlenet
    and inception_v3, which only training with them would use, are ignored.

    Raises:
        BundleError: keys or shapes differ, or a weight is not a finite real number; names the first such one and
            `source`.
    """
    net, own = classifier.net, classifier.net.state_dict()
    state = {_OLD_DENSENET_KEY.sub(r"\1\2", k): v for k, v in state.items() if not k.startswith(_AUXILIARY)}
    first, votes = first_conv(net), head(classifier.name, net)
    kernel = state.get(f"{first}.weight")
    if kernel is not None and kernel.shape[1:2] == (3,) and own[f"{first}.weight"].shape[1] == 1:
        state[f"{first}.weight"] = kernel.sum(dim=1, keepdim=True)
    fresh: set[str] = set()
    rows = state[f"{votes}.weight"].shape[:1] if f"{votes}.weight" in state else ()
    if rows and rows[0] != classifier.num_classes:
        if not new_head:
            raise BundleError(f"{source} has a head for {rows[0]} classes, but {classifier.num_classes} are named")
        fresh = {f"{votes}.weight", f"{votes}.bias"} & own.keys()
        state = {k: v for k, v in state.items() if k not in fresh}
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            there, here = tuple(state[key].shape), tuple(own[key].shape)
            raise BundleError(f"{source} does not fit {classifier.name}: {key} is {there}, expected {here}")
        if state[key].is_complex():
            raise BundleError(f"{source} does not fit {classifier.name}: {key} holds complex numbers")
    _copy_all(classifier, state, fresh, source)
    # Where they are float32: of some types that weights are stored in torch cannot say whether they are finite.
    for key, values in classifier.net.state_dict().items():
        if not bool(torch.isfinite(values).all()):
            raise BundleError(f"{source}: {key} holds NaN or infinity; take weights from before training diverged")


def _copy_all(classifier: Classifier, state: Mapping[str, Tensor], fresh: set[str], source: str) -> None:
    try:
        missing, unexpected = classifier.net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise BundleError(f"{source} does not fit {classifier.name}: {detail}") from None
    missing = [key for key in missing if key not in fresh]
    for keys, verb in ((missing, "lacks"), (unexpected, "has an unexpected")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise BundleError(f"{source} does not fit {classifier.name}: it {verb} {keys[0]}{more}")


def first_filters(classifier: Classifier) -> Tensor:
    """The learned kernels of the first convolution, (filters, channels, height, width), on the CPU."""
    return classifier.net.get_submodule(first_conv(classifier.net)).weight.detach().cpu()  # pyright: ignore


def feature_maps(classifier: Classifier, pixels: Tensor) -> dict[str, Tensor]:
    """What leaves each layer for uint8 pixels (N, H, W, C), in the order of computation, on the CPU.

    `classic` and `residual` show every layer, conv1 to fc, whose output are the votes; of other architectures only the
    first convolution is shown.
    """
    net, maps = classifier.net, {}
    first = first_conv(net)
    layers = dict(net.named_children()) if classifier.name in OWN else {first: net.get_submodule(first)}

    def keep(name: str) -> Any:
        # A copy: a following in-place ReLU would overwrite what was shown.
        return lambda _module, _inputs, output: maps.__setitem__(name, output.detach().cpu().clone())

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(keep(name)).remove)
        classifier(pixels)
    return maps


def channels_in(classifier: Classifier, state: Mapping[str, Tensor]) -> int:
    """The image channels that weights for this architecture were trained on: 1, else 3."""
    kernel = state.get(f"{first_conv(classifier.net)}.weight")
    return 1 if kernel is not None and kernel.shape[1:2] == (1,) else 3


def count_parameters(module: nn.Module) -> int:
    """How many numbers training would learn."""
    return sum(p.numel() for p in module.parameters())


def _try_out(classifier: Classifier) -> None:
    """Run one black image, so that an image size that does not work is said before any work is done."""
    spec = classifier.spec
    black = torch.zeros((1, spec.height, spec.width, spec.channels), dtype=torch.uint8)
    classifier.eval()
    try:
        with torch.inference_mode():
            shape = tuple(classifier(black).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise wrong_size(classifier.name, spec, error) from None
    classifier.train()
    if shape != (1, classifier.num_classes):
        raise ConfigError(f"model: {classifier.name} is no classifier: it returns {shape} for one image")


class _NoInit(TorchFunctionMode):
    """Leaves out the random initialisation of weights, or makes it constant where it is drawn until it fits."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in (Tensor.normal_, Tensor.uniform_):
            # trunc_normal_ draws again whatever is out of bounds: the mean and the lower bound never are.
            return args[0].fill_(args[1] if len(args) > 1 else 0.0)
        return func(*args, **kwargs)


_INITIALISERS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_)
