"""The networks themselves: `classic`, `residual`, torchvision's classification models, timm's."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from raycnn.config import ImageSpec, nearest
from raycnn.errors import ConfigError

CLASSIC = "classic"
CLASSIC_WIDTHS = (16, 32, 64)
CLASSIC_MAPS = 8
"""The second pooling leaves at most this many rows and columns, so the fully connected layer stays small."""

RESIDUAL = "residual"
RESIDUAL_WIDTHS = (16, 48, 96)

OWN = (CLASSIC, RESIDUAL)
"""Networks that are built here, for which nobody publishes weights."""
TIMM = "timm/"


def architectures() -> tuple[str, ...]:
    """Our own and every torchvision classification model; timm's, over a thousand, are not listed."""
    from torchvision import models

    return (*OWN, *models.list_models(module=models))


def timm_spec(name: str) -> ImageSpec:
    """The image spec that timm states for an architecture."""
    timm = import_timm()
    stated = timm.get_pretrained_cfg(checked_timm(timm, name))
    channels, height, width = stated.input_size
    return ImageSpec(
        height=height,
        width=width,
        channels=channels,
        crop=stated.crop_pct,
        mean=stated.mean,
        std=stated.std,
    )


def network(name: str, num_classes: int, spec: ImageSpec) -> nn.Module:
    """The architecture, which takes normalised (N, C, H, W) floats, with its own key names.

    Raises:
        ConfigError: unknown name, or it cannot be built for such images.
    """
    if num_classes < 1:
        raise ConfigError(f"model {name}: a classifier needs classes, got {num_classes}")
    if name == CLASSIC:
        return _classic(num_classes, spec)
    if name == RESIDUAL:
        return _residual(num_classes, spec)
    if name.startswith(TIMM):
        return _timm_net(name, num_classes, spec)
    return _torchvision_net(checked(name), num_classes, spec)


def _classic(num_classes: int, spec: ImageSpec) -> nn.Module:
    """Three convolutions, two poolings, one fully connected layer, and nothing else.

    Images above 64 px are strided by the first convolution (2 up to 128 px, then 4), whose kernel grows with
    its stride so that no pixel is skipped. The second pooling is as wide as it takes to leave at most
    CLASSIC_MAPS rows and columns. 28 x 28 x 1 and 10 classes: 54,666 parameters.
    """
    c1, c2, c3 = CLASSIC_WIDTHS
    stride = _first_stride(spec)
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


def _first_stride(spec: ImageSpec) -> int:
    """By which the first convolution of our own networks strides, so that large images stay affordable."""
    longest = max(spec.height, spec.width)
    return 1 if longest <= 64 else 2 if longest <= 128 else 4


def _residual(num_classes: int, spec: ImageSpec) -> nn.Module:
    """Nine convolutions with batch normalisation, of which three pairs are residual (He et al. 2015, arXiv 1512.03385).

    Made for small images on CPUs: few channels while there are many px, a stride in place of every pooling.
    28 x 28 x 1 and 10 classes: 424,026 parameters, 28 million multiplications an image.
    """
    c1, c2, c3 = RESIDUAL_WIDTHS
    stride = _first_stride(spec)
    layers: dict[str, nn.Module] = {
        "conv1": _normalised(spec.channels, c1, 2 * stride + 1, stride),
        "conv2": _normalised(c1, c2, 3, 2),
        "pair1": _Residual(c2),
        "conv3": _normalised(c2, c3, 3, 2),
        "pair2": _Residual(c3),
        "pair3": _Residual(c3),
        "mean": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(c3, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


def _normalised(channels_in: int, channels_out: int, side: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, side, stride, side // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(channels_out), relu=nn.ReLU()))


class _Residual(nn.Sequential):
    """Two convolutions whose output is added to what they were given."""

    def __init__(self, channels: int) -> None:
        super().__init__(OrderedDict(a=_normalised(channels, channels, 3), b=_normalised(channels, channels, 3)))

    @override
    def forward(self, maps: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return maps + super().forward(maps)


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
        raise wrong_size(name, spec, error) from None
    if spec.channels != 3:
        _take_gray(net)
    return net


def _take_gray(net: nn.Module) -> None:
    """Let the first convolution see one channel with the kernels summed over RGB.

    The sum answers to a gray image as the three did to its copy in R, G and B, and it keeps the variance that
    the architecture's own initialisation chose.
    """
    conv = net.get_submodule(first_conv(net))
    assert isinstance(conv, nn.Conv2d)
    conv.in_channels = 1
    conv.weight = nn.Parameter(conv.weight.detach().sum(dim=1, keepdim=True))


def _timm_net(name: str, num_classes: int, spec: ImageSpec) -> nn.Module:
    timm = import_timm()
    model = checked_timm(timm, name)
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": spec.channels}
    if timm.get_pretrained_cfg(model).fixed_input_size:
        options["img_size"] = (spec.height, spec.width)
    try:
        return timm.create_model(model, pretrained=False, **options)
    except (ValueError, AssertionError) as error:
        raise wrong_size(name, spec, error) from None


def import_timm() -> Any:
    """timm, if it is installed."""
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("timm's models need timm: pip install 'raycnn[timm]'") from None
    return timm


def check_name(name: str) -> None:
    """Raise ConfigError, with the nearest name, where no architecture has this one."""
    if name.startswith(TIMM):
        checked_timm(import_timm(), name)
    elif name not in OWN:
        checked(name)


def checked_timm(timm: Any, name: str) -> str:
    """The name that timm knows an architecture by."""
    model = name.removeprefix(TIMM)
    if not timm.is_model(model):
        raise ConfigError(f"model: timm has no {model!r}{nearest(model, timm.list_models())}")
    return model


def checked(name: str) -> str:
    """The name, if it is torchvision's; ConfigError with the nearest one otherwise."""
    known = architectures()
    if name not in known:
        raise ConfigError(
            f"model: unknown architecture {name!r}{nearest(name, known)}; "
            "known are classic, residual, torchvision's classification models and timm/NAME"
        )
    return name


def wrong_size(name: str, spec: ImageSpec, error: Exception) -> ConfigError:
    """What to raise when an architecture fails on the size of its images."""
    cause = str(error).strip().splitlines()[0].rstrip(".")
    return ConfigError(
        f"model {name} cannot take images of {spec.height} x {spec.width} px ({cause}); "
        "choose another image size or another model"
    )


def first_conv(net: nn.Module) -> str:
    """The name of the convolution that sees the image."""
    return next((name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)), "")


def head(name: str, net: nn.Module) -> str:
    """The name of the layer that casts the votes."""
    if name.startswith(TIMM):
        stated = net.pretrained_cfg.get("classifier")  # pyright: ignore
        return stated if isinstance(stated, str) else stated[0]
    return [key for key, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
