"""The zoo: `classic`, torchvision's classification models, timm's; all behind one `Classifier`.

A Classifier takes uint8 pixels as they leave `raycnn.images` and normalises them itself, so mean and std
cannot be forgotten or applied twice. torchvision takes seconds to import, so that waits until one of its models
is asked for.
"""

import contextlib
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raycnn.config import IMAGENET_MEAN, IMAGENET_STD, ImageSpec, nearest
from raycnn.errors import BundleError, ConfigError, StorageError
from raycnn.storage import open_store

CLASSIC = "classic"
CLASSIC_WIDTHS = (16, 32, 64)
CLASSIC_MAPS = 8
"""The second pooling leaves at most this many rows and columns, so the fully connected layer stays small."""

TIMM = "timm/"
GRAY_MEAN, GRAY_STD = (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
"""ImageNet's, averaged over red, green and blue."""

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
_PUBLISHED_NAME = re.compile(r"(?:\w+_Weights\.)?([A-Z][A-Z0-9_]*)")


class Classifier(nn.Module):
    """An architecture with its input: uint8 pixels in, logits out."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, net: nn.Module, spec: ImageSpec, num_classes: int) -> None:
        """Wrap `net`, which takes normalised (N, C, H, W) floats; its key names stay its own."""
        super().__init__()
        self.name, self.net, self.spec, self.num_classes = name, net, spec, num_classes
        for key, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(key, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, num_classes) for uint8 pixels (N, H, W, C); float32 unless autocast says otherwise."""
        x = pixels.permute(0, 3, 1, 2).to(self.mean.dtype, memory_format=torch.channels_last)
        return self.net((x / 255 - self.mean) / self.std)


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
        classifier = _assemble(name, num_classes, spec)
        if weights is not None:
            fill(classifier, load_weights(name, weights), weights, new_head=True)
    _try_out(classifier)
    return classifier


def blank(name: str, num_classes: int, spec: ImageSpec) -> Classifier:
    """A classifier whose weights are undefined memory until `fill`; for vit_l_16 0.1 s instead of 8 s."""
    with _NoInit():
        return _assemble(name, num_classes, spec)


def fill(classifier: Classifier, state: Mapping[str, Tensor], source: str, *, new_head: bool = False) -> None:
    """Copy `state` into the classifier's architecture: every weight, or none is trusted.

    With `new_head`, a head for another number of classes keeps its own values. Auxiliary heads of googlenet
    and inception_v3, which only training with them would use, are ignored.

    Raises:
        BundleError: keys or shapes differ; names the first difference and `source`.
    """
    net, own = classifier.net, classifier.net.state_dict()
    state = {_OLD_DENSENET_KEY.sub(r"\1\2", k): v for k, v in state.items() if not k.startswith(_AUXILIARY)}
    first, head = _first_conv(net), _head(classifier)
    kernel = state.get(f"{first}.weight")
    if kernel is not None and kernel.shape[1:2] == (3,) and own[f"{first}.weight"].shape[1] == 1:
        state[f"{first}.weight"] = kernel.sum(dim=1, keepdim=True)
    fresh: set[str] = set()
    classes = state[f"{head}.weight"].shape[:1] if f"{head}.weight" in state else (classifier.num_classes,)
    if classes != (classifier.num_classes,):
        if not new_head:
            raise BundleError(f"{source} has a head for {classes[0]} classes, but {classifier.num_classes} are named")
        fresh = {f"{head}.weight", f"{head}.bias"} & own.keys()
        state = {k: v for k, v in state.items() if k not in fresh}
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            there, here = tuple(state[key].shape), tuple(own[key].shape)
            raise BundleError(f"{source} does not fit {classifier.name}: {key} is {there}, expected {here}")
    _copy_all(classifier, state, fresh, source)


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
    return classifier.net.get_submodule(_first_conv(classifier.net)).weight.detach().cpu()  # pyright: ignore


def feature_maps(classifier: Classifier, pixels: Tensor) -> dict[str, Tensor]:
    """What leaves each layer for uint8 pixels (N, H, W, C), in the order of computation, on the CPU.

    `classic` shows every layer, conv1 to fc, whose output are the votes; of other architectures only the
    first convolution is shown.
    """
    net, maps = classifier.net, {}
    first = _first_conv(net)
    layers = dict(net.named_children()) if classifier.name == CLASSIC else {first: net.get_submodule(first)}

    def keep(name: str) -> Any:
        # A copy: a following in-place ReLU would overwrite what was shown.
        return lambda _module, _inputs, output: maps.__setitem__(name, output.detach().cpu().clone())

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(keep(name)).remove)
        classifier(pixels)
    return maps


def count_parameters(module: nn.Module) -> int:
    """How many numbers training would learn."""
    return sum(p.numel() for p in module.parameters())


# -- weights ------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """What torchvision says of one set of weights that it publishes."""

    name: str
    url: str
    spec: ImageSpec
    class_names: tuple[str, ...]
    interpolation: str


def published(name: str) -> list[Published]:
    """The weights that torchvision publishes for an architecture, the recommended one first; [] for others.

    googlenet and inception_v3 were trained on pixels in [-1, 1], which torchvision hides in a
    `transform_input` flag; here that is their mean and std.
    """
    if name == CLASSIC or name.startswith(TIMM):
        return []
    from torchvision.models import get_model_weights

    known = get_model_weights(_checked(name))
    entries = sorted(known, key=lambda entry: entry != known.DEFAULT)  # pyright: ignore[reportAttributeAccessIssue]
    return [_published(name, entry) for entry in entries if "categories" in (entry.meta or {})]


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
    categories = tuple(entry.meta["categories"] or ())
    return Published(entry.name, entry.url, spec, categories, preset.interpolation.value)


def is_published_name(weights: str) -> bool:
    """Whether `weights` is a name such as DEFAULT or ResNet50_Weights.IMAGENET1K_V2, rather than a file."""
    return _PUBLISHED_NAME.fullmatch(weights) is not None


def load_weights(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict in `weights`: a file, local or s3://, or a name published for the architecture."""
    if not is_published_name(weights):
        return read_weights(weights)
    if name == CLASSIC:
        raise ConfigError(f"weights: nobody publishes {weights} for classic; give a .safetensors file")
    return _timm_weights(name, weights) if name.startswith(TIMM) else _download(name, weights)


def read_weights(url: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state dict (torch.save), which is read with weights_only.

    Raises:
        BundleError: the file is neither.
        StorageError: it cannot be read.
    """
    path, mark, options = url.partition("?")
    folder, _, leaf = path.rpartition("/")
    folder = folder or ("/" if path.startswith("/") else ".")
    return parse_weights(open_store(folder + mark + options).get(leaf), url)


def parse_weights(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a .safetensors file or a state dict; `source` names them in errors."""
    import io
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load

    if source.partition("?")[0].endswith(".safetensors"):
        try:
            return load(data)
        except SafetensorError as error:
            raise BundleError(f"{source} is not a readable .safetensors file: {error}") from None
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
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

    known: dict[str, Any] = dict(get_model_weights(_checked(name)).__members__)
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
    timm = _timm()
    if weights != "DEFAULT":
        raise ConfigError(f"weights: timm knows only DEFAULT here, not {weights}; tags belong to the model's name")
    model = _checked_timm(timm, name)
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return timm.create_model(model, pretrained=True).state_dict()
    except (OSError, RuntimeError, HfHubHTTPError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(
            f"cannot download the weights of {name} from the Hugging Face Hub: {cause}; "
            f"fetch model.safetensors elsewhere and give its path as the weights"
        ) from None


# -- architectures ------------------------------------------------------------------------------------------


def architectures() -> tuple[str, ...]:
    """`classic` and every torchvision classification model; timm's, over a thousand, are not listed."""
    from torchvision import models

    return (CLASSIC, *models.list_models(module=models))


def timm_spec(name: str) -> ImageSpec:
    """The image spec that timm states for an architecture."""
    timm = _timm()
    stated = timm.get_pretrained_cfg(_checked_timm(timm, name))
    channels, height, width = stated.input_size
    return ImageSpec(
        height=height,
        width=width,
        channels=channels,
        crop=stated.crop_pct,
        mean=stated.mean,
        std=stated.std,
    )


def _assemble(name: str, num_classes: int, spec: ImageSpec) -> Classifier:
    if num_classes < 1:
        raise ConfigError(f"model {name}: a classifier needs classes, got {num_classes}")
    if name == CLASSIC:
        net = _classic(num_classes, spec)
    elif name.startswith(TIMM):
        net = _timm_net(name, num_classes, spec)
    else:
        net = _torchvision_net(_checked(name), num_classes, spec)
    return Classifier(name, net, spec, num_classes)


def _classic(num_classes: int, spec: ImageSpec) -> nn.Module:
    """Three convolutions, two poolings, one fully connected layer, and nothing else.

    Images above 64 px are strided by the first convolution (2 up to 128 px, then 4), whose kernel grows with
    its stride so that no pixel is skipped. The second pooling is as wide as it takes to leave at most
    CLASSIC_MAPS rows and columns. 28 x 28 x 1 and 10 classes: 54,666 parameters.
    """
    c1, c2, c3 = CLASSIC_WIDTHS
    longest = max(spec.height, spec.width)
    stride = 1 if longest <= 64 else 2 if longest <= 128 else 4
    # Rows and columns after the first pooling; every layer rounds up, so nothing at the border is lost.
    maps = [-(-side // (2 * stride)) for side in (spec.height, spec.width)]
    pool = [max(2, -(-side // CLASSIC_MAPS)) for side in maps]
    votes = c3 * -(-maps[0] // pool[0]) * -(-maps[1] // pool[1])
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(spec.channels, c1, 2 * stride + 1, stride=stride, padding=stride),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(c1, c2, 3, padding=1),
        "relu2": nn.ReLU(),
        "pool1": nn.MaxPool2d(2, ceil_mode=True),
        "relu3": nn.ReLU(),
        "conv3": nn.Conv2d(c2, c3, 3, padding=1),
        "relu4": nn.ReLU(),
        "pool2": nn.MaxPool2d((pool[0], pool[1]), ceil_mode=True),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(votes, num_classes),
    }
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(OrderedDict(layers))


def _torchvision_net(name: str, num_classes: int, spec: ImageSpec) -> nn.Module:
    from torchvision.models import get_model

    options: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        options["image_size"] = spec.height
    if name == "maxvit_t":
        options["input_size"] = (spec.height, spec.width)
    try:
        net = get_model(name, **options)
    except (ValueError, AssertionError) as error:
        raise _wrong_size(name, spec, error) from None
    if spec.channels != 3:
        _take_gray(net)
    return net


def _take_gray(net: nn.Module) -> None:
    """Let the first convolution see one channel with the kernels summed over RGB.

    The sum answers to a gray image as the three did to its copy in R, G and B, and it keeps the variance that
    the architecture's own initialisation chose.
    """
    name = _first_conv(net)
    old = net.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    new = nn.Conv2d(
        1, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, bias=old.bias is not None
    )
    with torch.no_grad():
        new.weight.copy_(old.weight.sum(dim=1, keepdim=True))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, new)


def _timm_net(name: str, num_classes: int, spec: ImageSpec) -> nn.Module:
    timm = _timm()
    model = _checked_timm(timm, name)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": spec.channels}
    if timm.get_pretrained_cfg(model).fixed_input_size:
        options["img_size"] = (spec.height, spec.width)
    try:
        return timm.create_model(model, pretrained=False, **options)
    except (ValueError, AssertionError) as error:
        raise _wrong_size(name, spec, error) from None


def _timm() -> Any:
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("timm's models need timm: pip install 'raycnn[timm]'") from None
    return timm


def _checked_timm(timm: Any, name: str) -> str:
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        raise ConfigError(f"model: timm has no {model!r}{nearest(model, timm.list_models())}")
    return model


def _checked(name: str) -> str:
    known = architectures()
    if name not in known:
        raise ConfigError(
            f"model: unknown architecture {name!r}{nearest(name, known)}; "
            "known are classic, torchvision's classification models and timm/NAME"
        )
    return name


def _try_out(classifier: Classifier) -> None:
    """Run one black image, so that an image size that does not work is said before any work is done."""
    spec = classifier.spec
    black = torch.zeros((1, spec.height, spec.width, spec.channels), dtype=torch.uint8)
    classifier.eval()
    try:
        with torch.inference_mode():
            shape = tuple(classifier(black).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _wrong_size(classifier.name, spec, error) from None
    classifier.train()
    if shape != (1, classifier.num_classes):
        raise ConfigError(f"model: {classifier.name} is no classifier: it returns {shape} for one image")


def _wrong_size(name: str, spec: ImageSpec, error: Exception) -> ConfigError:
    cause = str(error).strip().splitlines()[0].rstrip(".")
    return ConfigError(
        f"model {name} cannot take images of {spec.height} x {spec.width} px ({cause}); "
        "choose another image size or another model"
    )


def _first_conv(net: nn.Module) -> str:
    return next((name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)), "")


def _head(classifier: Classifier) -> str:
    """The name of the layer that casts the votes."""
    if classifier.name.startswith(TIMM):
        stated = classifier.net.pretrained_cfg.get("classifier")  # pyright: ignore
        return stated if isinstance(stated, str) else stated[0]
    last = [name for name, m in classifier.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return last[-1]


class _NoInit(TorchFunctionMode):
    """Leaves out the random initialisation of weights."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
