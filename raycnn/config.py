"""One frozen schema per verb: the Python keyword arguments, the flags, the YAML keys and their documentation.

A field's docstring is its help text; its default stands here and nowhere else.
Precedence, lowest first: default, file, environment (`RAYCNN_<VERB>_<FIELD>`), flag.
"""

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from raycnn.errors import ConfigError, one_line

MIB = 1024 * 1024
GIB = 1024 * MIB

MAX_IMAGE_BYTES = 64 * MIB
"""Largest encoded image; labels and the endpoint hold to it alike."""

HISTOGRAM_BINS = 100
"""Of the confidences in a bundle's validation and in label outputs."""

FLOAT32, FLOAT16 = "float32", "float16"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GRAY_MEAN, GRAY_STD = (sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,)
"""ImageNet's, averaged over red, green and blue."""


def precision_on(device: str) -> str:
    """The arithmetic that predictions on a device are held to: float16 on "cuda", float32 elsewhere.

    It decides the tolerance against the bundle's self-test, so labels of different precisions are different labels.
    """
    return FLOAT16 if device.partition(":")[0] == "cuda" else FLOAT32


def absolute(url: str) -> str:
    """A local path made absolute, because Ray's workers may stand in another folder; a URL as it is."""
    return os.path.abspath(os.path.expanduser(url)) if url and "://" not in url else url


def _local(path: str) -> str:
    if "://" in path:
        raise ValueError("a folder on this machine is needed")
    return absolute(path)


Url = Annotated[str, AfterValidator(absolute)]
"""A local path, or s3://bucket/prefix."""

Folder = Annotated[str, AfterValidator(_local)]
"""A path on this machine."""

Patterns = Annotated[
    tuple[str, ...],
    Field(
        description="Glob patterns of objects to leave out, by their path below the collection (* matches / too): "
        "images, or whole tars, Parquet and IDX files; keys inside those are not matched."
    ),
]

MAX_SIDE = 4096
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
"""Height or width of pixels in px."""


def _share(value: Any) -> Any:
    """`5%` is 0.05."""
    text = value.strip() if isinstance(value, str) else ""
    if not text.endswith("%"):
        return value
    try:
        return float(text[:-1]) / 100
    except ValueError:
        return value  # whose type is refused


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1)]
"""A share as a number from 0 to 1, or in percent: 0.05 or `5%`."""


def _seconds(value: Any) -> Any:
    """`15m` is 900."""
    text = value.strip() if isinstance(value, str) else ""
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if factor is None:
        return value
    try:
        return float(text[:-1]) * factor
    except ValueError:
        return value  # whose type is refused


Duration = Annotated[float, BeforeValidator(_seconds), Field(ge=0)]
"""Seconds, or a number with a unit: `90s`, `15m`, `2h`."""


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True, allow_inf_nan=False
    )


class ImageSpec(_Frozen):
    """What a model's input looks like. It belongs to the bundle: labeling and serving cannot override it."""

    height: Side = 224
    """Height of the pixels in px."""
    width: Side = 224
    """Width of the pixels in px."""
    channels: Literal[1, 3] = 3
    """1 for grayscale, 3 for RGB."""
    crop: float = Field(default=0.875, gt=0, le=1)
    """Share of the largest centred box of the model's aspect ratio that is kept (torchvision: 224/256)."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean per channel of pixels in [0, 1]; subtracted inside the model."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation per channel of pixels in [0, 1]; divided by inside the model."""

    @model_validator(mode="after")
    def _one_number_per_channel(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need {self.channels} numbers each, one per channel")
        return self


class Limits(_Frozen):
    """Caps that are checked before memory is taken for an image."""

    max_bytes: int = Field(default=MAX_IMAGE_BYTES, ge=1)
    """Largest encoded image in bytes."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Largest width x height in px, read from the header."""


class VerbConfig(_Frozen):
    """What every verb's schema has in common."""

    verb: ClassVar[str]
    positional: ClassVar[tuple[str, ...]] = ()
    """The fields that the command line also takes without a flag, in this order."""


class PackConfig(VerbConfig):
    """Turn any layout of images into packed Parquet shards with a manifest."""

    verb: ClassVar[str] = "pack"
    positional: ClassVar[tuple[str, ...]] = ("src", "dst")

    src: Url
    """Images: a folder or s3:// prefix of any known layout (class folders, split/class folders, CSV, JSONL or
    Parquet lists, Hugging Face Parquet, WebDataset tars, IDX files, or a flat prefix)."""
    dst: Url
    """Where the packed data set goes: a folder or s3:// prefix."""
    val: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images that becomes the validation split, where the source does not name one."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Share of the images that becomes the test split, where the source does not name one."""
    exclude: Patterns = ()
    shard_mib: int = Field(default=128, ge=1, le=256)
    """Aimed size of a shard in MiB."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Decides the order in which images are mixed."""
    labels: Url | None = None
    """Labels that came back from people: a CSV, TSV, JSON Lines or Parquet file with the columns `key` and `label`
    (class names), a `review.csv` whose column `corrected` was filled in, or Label Studio's JSON export. They give
    these keys their label, whatever the source says; lines of a `review.csv` that were left empty say nothing."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError("val + test must be below 1, so that something is left to train on")
        return self


class TrainConfig(VerbConfig):
    """Train a classifier, data-parallel, and leave a bundle."""

    verb: ClassVar[str] = "train"
    positional: ClassVar[tuple[str, ...]] = ("data", "run")

    data: Url
    """A packed data set, or any layout that `raycnn pack` reads."""
    run: Url
    """The run folder: bundle, checkpoints, metrics. The same command again resumes it."""
    model: str = "classic"
    """`classic`, `residual`, a torchvision classification model, or `timm/NAME`."""
    weights: str | None = None
    """Start from these weights: a .safetensors file, a state dict, or a torchvision weights name (DEFAULT)."""
    freeze: bool = False
    """Train the last layer only; all others keep the weights that the run started from."""
    image_size: int | Literal["auto"] = "auto"
    """Side of the model's input in px; auto: the images' own size if all are equal and at most 64, else 224."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the training split."""
    max_time: Duration = 0.0
    """Most time to train, such as `15m` or `2h`; the schedule ends then, or after `epochs`; 0: any."""
    patience: int = Field(default=0, ge=0)
    """Stop when the accuracy on validation has not risen for so many epochs; 0: never."""
    batch_size: int = Field(default=64, ge=1)
    """Images per optimizer step, over all workers together."""
    accumulate: int = Field(default=1, ge=1)
    """Parts that each worker cuts its share of a batch into, for want of memory; the step is one."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak of the schedule."""
    schedule: Literal["cosine", "linear", "one-cycle"] = "cosine"
    """How the learning rate falls to zero after its warm-up; one-cycle also lowers the momentum while the rate is
    high, and raises the rate as a cosine."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps in which the learning rate rises."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from each block of layers to the one before it, so that the first ones, which know
    most already, learn slowest; 1: all alike."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay; not applied to biases and normalisation."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Longest gradient, as the norm over all weights, that a step follows; 0: any."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the average of the weights that is evaluated and becomes the bundle; 0: the last weights."""
    imbalance: Literal["none", "weights", "sampler", "logit-adjust"] = "none"
    """For rare classes: weights makes each class count alike in the loss; sampler shows rare classes more often, and
    frequent ones less; logit-adjust adds the logarithms of the classes' shares to the votes while training."""
    crop_scale: float = Field(default=0.8, gt=0, le=1)
    """Smallest share of an image that a random training box covers; 1 trains on the same box as evaluation."""
    flip: bool = False
    """Mirror every second image, left to right, by chance."""
    shift: int = Field(default=0, ge=0, le=MAX_SIDE)
    """Move images by up to so many px each way."""
    augment: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugment, one random operation for an image, or RandAugment, two."""
    erase: Share = 0.0
    """Share of the images of which a random rectangle is erased."""
    mixup: float = Field(default=0.0, ge=0)
    """Blend pairs of images; the parameter of the Beta distribution that the shares come from; 0: never."""
    cutmix: float = Field(default=0.0, ge=0)
    """Paste a rectangle of one image into another, likewise; with both each step takes one of the two by chance."""
    start_size: int = Field(default=0, ge=0, le=MAX_SIDE)
    """Side in px that training begins with, growing to the image size over two thirds of it; 0: no growth."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto: bfloat16 on GPUs, float32 on CPUs."""
    compile: bool = False
    """Compile the model with torch.compile; pays where a run is long."""
    cache_gib: float = Field(default=8.0, ge=0)
    """Decoded images that a node keeps on its disk in GiB, so that later epochs need not decode; 0, or too little for
    the training split: none."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Decides initial weights, order and augmentation."""
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints within an epoch; each epoch ends with one, too."""
    num_workers: int = Field(default=1, ge=1)
    """Training workers; one per GPU in production."""
    min_workers: int = Field(default=0, ge=0)
    """With how many workers to go on where the cluster has no room for all; 0: with all or none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has a GPU for every worker."""
    max_failures: int = Field(default=3, ge=0)
    """How often a dead worker is replaced before the run gives up."""
    max_bad: Share = 0.05
    """Share of unreadable training images above which the run stops; those without a label do not count."""
    find_lr: bool = False
    """Train nothing: try ever higher learning rates on a copy of the model, and leave find_lr.png and a suggestion."""

    @field_validator("image_size")  # Side among several types makes a message of several lines
    @classmethod
    def _a_side(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= MAX_SIDE:
            raise ValueError(f"choose auto, or 1 to {MAX_SIDE} px")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        if self.freeze and self.weights is None:
            raise ValueError("freeze needs weights to start from: without them all but the last layer stay random")
        return self


class EvaluateConfig(VerbConfig):
    """Count how a bundle does on labelled images: every row exactly once."""

    verb: ClassVar[str] = "evaluate"
    positional: ClassVar[tuple[str, ...]] = ("bundle", "data")

    bundle: Url
    """The bundle to evaluate."""
    data: Url
    """A packed data set, or any labelled layout."""
    split: str = "auto"
    """train, val, test or all; auto: test if there is one, else val, else all."""
    exclude: Patterns = ()
    flips: bool = False
    """Count a second time, apart, by the mean of the votes of each image and of its mirror image."""


class LabelConfig(VerbConfig):
    """Give every image exactly one label row."""

    verb: ClassVar[str] = "label"
    positional: ClassVar[tuple[str, ...]] = ("data", "out")

    data: Url
    """Images: a packed data set, or any layout that `raycnn pack` reads."""
    out: Url
    """Where the labels go: a folder or s3:// prefix. The same command again resumes, or finds nothing to do."""
    bundle: Url
    """The bundle that predicts."""
    split: str = "all"
    """train, val, test or all."""
    exclude: Patterns = ()
    top_k: int = Field(default=5, ge=1, le=100)
    """How many classes a row lists, best first."""
    abstain: Share = 0.0
    """Leave label and class_name empty where the probability is below this; 0 labels all. What it costs is said."""
    embeddings: bool = False
    """Also write what the last layer is given, float16, to embeddings/ beside labels/."""
    max_bad: Share = 1.0
    """Share of a generation's images that may have no label because of what they are, such as `1%`; the run stops
    when there are more."""
    layout: Literal["auto", "fused", "staged"] = "auto"
    """fused: each process does it all; staged: tasks decode for actors that predict; auto: staged where there are
    GPUs."""
    single_driver: bool = False
    """Accept a store without conditional PUT: you promise that no other run writes to this output."""
    accept_unreadable: bool = False
    """Write rows with status `unreadable` for a shard that cannot be read or was replaced, instead of stopping."""


class VerifyConfig(VerbConfig):
    """Prove a label output from the outside."""

    verb: ClassVar[str] = "verify"
    positional: ClassVar[tuple[str, ...]] = ("out",)

    out: Url
    """The output of `raycnn label`."""
    deep: bool = False
    """List the inputs again and compare them with the plan, too."""


class ExportConfig(VerbConfig):
    """Compact a finished label output into a few large Parquet files."""

    verb: ClassVar[str] = "export"
    positional: ClassVar[tuple[str, ...]] = ("out", "dst")

    out: Url
    """The output of `raycnn label`, finished."""
    dst: Url
    """Where the files go: a folder or s3:// prefix. The same command again resumes, or adds what is new."""
    embeddings: bool = False
    """Add a column with the embeddings, which `raycnn label --embeddings` has written."""


class ReviewConfig(VerbConfig):
    """Pick the images most worth a person's look: a contact sheet, and tasks for Label Studio."""

    verb: ClassVar[str] = "review"
    positional: ClassVar[tuple[str, ...]] = ("out", "dst")

    out: Url
    """The output of `raycnn label`, finished."""
    dst: Folder
    """A new or empty folder for the images, contact.png, review.csv, and Label Studio's tasks.json and config.xml."""
    count: int = Field(default=100, ge=1, le=1000)
    """How many images to pick."""


class ServeConfig(VerbConfig):
    """Serve bundles over HTTP with Ray Serve."""

    verb: ClassVar[str] = "serve"

    bundle: tuple[str, ...] = Field(min_length=1)
    """The bundle to serve; [NAME=]BUNDLE, and again for more of them."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the endpoint to the network, which has no authentication."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    replicas: int = Field(default=1, ge=1)
    """Copies of each model."""
    max_queued: int = Field(default=256, ge=1)
    """Requests waiting for a model before further ones are answered 503."""
    max_bytes: int = Field(default=16 * MIB, ge=1, le=MAX_IMAGE_BYTES)
    """Largest request body in bytes, up to 64 MiB; more is answered 413."""

    @field_validator("bundle", mode="before")
    @classmethod
    def _one_is_enough(cls, value: Any) -> Any:
        """`serve run raycnn.serving:app bundle=DIR` gives a string."""
        return (value,) if isinstance(value, str) else value


class ImportConfig(VerbConfig):
    """Make a bundle from a known architecture and its weights."""

    verb: ClassVar[str] = "import"
    positional: ClassVar[tuple[str, ...]] = ("model", "dst")

    model: str
    """`classic`, `residual`, a torchvision classification model, or `timm/NAME`."""
    dst: Url
    """Where the bundle goes."""
    weights: str
    """A .safetensors file, a state dict, or a torchvision weights name such as DEFAULT."""
    classes: str = "imagenet"
    """A text file with one class name a line, in the order of the model's outputs; or `imagenet`."""
    image_size: Side = 224
    """Side of the model's input in px."""


class DemoConfig(VerbConfig):
    """Everything once, on real images, with no network and no account."""

    verb: ClassVar[str] = "demo"

    dir: Folder = "raycnn-demo"
    """Folder for all that the demo makes."""
    data: str = "digits"
    """`digits`, `fashion-mnist`, or a folder of labelled images."""
    store: Url | None = None
    """Use this folder as the store, instead of a local S3 server."""


C = TypeVar("C", bound=VerbConfig)


def make(schema: type[C], values: Mapping[str, Any]) -> C:
    """The validated configuration, or ConfigError naming the nearest valid key or the offending value."""
    for key in values:
        if key not in schema.model_fields:
            raise ConfigError(f"{schema.verb}: unknown key {key!r}{nearest(key, schema.model_fields)}")
    try:
        return schema(**values)
    except ValidationError as error:
        raise ConfigError(f"{schema.verb}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, as one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {message}, got {first['input']!r}" if where else message


def nearest(word: str, known: Mapping[str, Any] | tuple[str, ...] | list[str]) -> str:
    """` (did you mean 'epochs'?)`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def from_environment(schema: type[VerbConfig], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The fields that `RAYCNN_<VERB>_<FIELD>` sets; tuples are separated by commas when validated.

    Raises:
        ConfigError: a variable of the verb names no field.
    """
    prefix = f"RAYCNN_{schema.verb.upper()}_"
    fields = {prefix + field.upper(): field for field in schema.model_fields}
    found: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith(prefix):
            continue
        if name not in fields:
            raise ConfigError(f"{schema.verb}: unknown environment variable {name}{nearest(name, fields)}")
        is_tuple = str(schema.model_fields[fields[name]].annotation).startswith("tuple")
        found[fields[name]] = tuple(value.split(",")) if is_tuple else value
    return found


def from_file(schema: type[VerbConfig], path: str) -> dict[str, Any]:
    """The keys of a YAML file on this machine (a recipe)."""
    try:
        return from_yaml(schema, Path(path).read_bytes(), path)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(f"{path}: not readable: {one_line(error)}") from None


def from_yaml(schema: type[VerbConfig], content: bytes, path: str) -> dict[str, Any]:
    """The keys of YAML that lies at a path, such as the `config.yaml` that a run has left."""
    import yaml

    try:
        values = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines for {schema.verb}")
    for key in values:
        if not isinstance(key, str):  # YAML reads 1, on and yes as something else
            raise ConfigError(f"{path}: the key {key!r} is no text, and no key of {schema.verb}; remove it")
    return values


def to_yaml(config: VerbConfig) -> str:
    """The resolved configuration as YAML, to be saved beside an output."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class Verb(NamedTuple):
    """One verb: its schema, and where its implementation lies (imported when it is called)."""

    schema: type[VerbConfig]
    module: str
    function: str

    def load(self) -> Callable[..., Any]:
        """The function that takes the configuration and returns the verb's report (a dataclass)."""
        return getattr(importlib.import_module(self.module), self.function)


VERBS: dict[str, Verb] = {
    "demo": Verb(DemoConfig, "raycnn.demo", "demo"),
    "pack": Verb(PackConfig, "raycnn.packing", "pack"),
    "train": Verb(TrainConfig, "raycnn.reporting", "train"),
    "evaluate": Verb(EvaluateConfig, "raycnn.evaluating", "evaluate"),
    "label": Verb(LabelConfig, "raycnn.labeling", "label"),
    "verify": Verb(VerifyConfig, "raycnn.ledger", "verify"),
    "review": Verb(ReviewConfig, "raycnn.reviewing", "review"),
    "export": Verb(ExportConfig, "raycnn.exchange", "export"),
    "serve": Verb(ServeConfig, "raycnn.serving", "serve"),
    "import": Verb(ImportConfig, "raycnn.bundle", "import_model"),
}


def callable_verb(verb: Verb, name: str) -> Callable[..., Any]:
    """The verb as a Python function: positional arguments fill the schema's fields in their order."""

    def call(*args: Any, **kwargs: Any) -> Any:
        fields = list(verb.schema.model_fields)
        if len(args) > len(fields):
            raise ConfigError(f"{name}: at most {len(fields)} arguments, got {len(args)}")
        values = dict(zip(fields, args, strict=False))
        if twice := values.keys() & kwargs.keys():
            raise ConfigError(f"{name}: {sorted(twice)[0]} is given twice")
        return verb.load()(make(verb.schema, values | kwargs))

    call.__name__ = call.__qualname__ = name
    call.__doc__ = verb.schema.__doc__
    call.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        [
            inspect.Parameter(
                field,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if info.is_required() else info.default,
                annotation=info.annotation,
            )
            for field, info in sorted(verb.schema.model_fields.items(), key=lambda f: not f[1].is_required())
        ]
    )
    return call
