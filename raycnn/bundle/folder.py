"""Writing and reading the hand-over folder."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

import raycnn
from raycnn import images, models
from raycnn.bundle.card import architecture_keys, model_card
from raycnn.bundle.graph import GRAPH, graph_files
from raycnn.bundle.selftest import EXPECTED, SelfTest, run_selftest, selftest_files
from raycnn.config import ImageSpec, explain
from raycnn.errors import BundleError, ObjectMissing
from raycnn.models import Classifier
from raycnn.storage import Store, open_store

FORMAT, VERSION = "raycnn-bundle", 1
CONFIG, WEIGHTS, VALIDATION, CARD = "config.json", "model.safetensors", "validation.json", "README.md"


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle, whose files and self-test have been checked."""

    url: str
    classifier: Classifier
    """On the CPU, in evaluation mode."""
    class_names: tuple[str, ...]
    spec: ImageSpec
    temperature: float
    """What logits are divided by before softmax."""
    digest: str
    """sha256 over what decides predictions: weights, architecture, class names, image spec, temperature."""
    weights_sha256: str
    pixel_digest: str
    """sha256 over the self-test's pixels as this machine makes them."""
    config: dict[str, Any]
    validation: dict[str, Any]
    selftest: SelfTest
    graph: bytes | None
    """The content of model.onnx, where there is one."""


class _Config(BaseModel):
    """The part of config.json that loading depends on."""

    model_config = ConfigDict(extra="ignore")

    version: int
    model: str
    label_names: tuple[str, ...] = Field(min_length=1)
    image_spec: ImageSpec
    temperature: float = Field(gt=0)
    versions: dict[str, str]
    files: dict[str, str]


def save(
    url: str,
    classifier: Classifier,
    class_names: Sequence[str],
    *,
    temperature: float,
    metrics: Mapping[str, Any],
    validation: Mapping[str, Any],
    samples: Sequence[bytes],
    data_fingerprint: str | None,
    recipe: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write a bundle to a folder or s3:// prefix, replacing one that is there, and load it back.

    The same arguments give the same bytes. Whoever reads while this writes, or after it was cut short, gets a
    BundleError and never a mixture. Warns where the architecture cannot become an ONNX graph; the bundle is good
    without.

    Args:
        url: Where the bundle goes.
        classifier: On any device; it is left as it is.
        class_names: One name for each of the model's outputs, in their order; no name twice.
        temperature: What logits are divided by before softmax; 1 where nothing was fitted.
        metrics: What is known of the model's quality, for config.json and the model card.
        validation: The content of validation.json.
        samples: Encoded images for the self-test, best from the validation split; the first few that can be
            decoded are kept. Images drawn by code take their place if there are none.
        data_fingerprint: What identifies the training data.
        recipe: The resolved configuration that made the model.

    Raises:
        BundleError: names and outputs differ in number, a name stands twice, or logits are not finite.
        StorageError: the store refuses; what is there is then no bundle.
    """
    names = tuple(class_names)
    check_names(names, classifier.num_classes)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in classifier.net.state_dict().items()}
    # A copy, so that the caller's may be on any device and in any mode.
    twin = models.blank(classifier.name, classifier.num_classes, classifier.spec)
    models.fill(twin, tensors, classifier.name)
    expected, selftest = selftest_files(twin.eval().requires_grad_(False), samples)
    files = {WEIGHTS: _dump_weights(tensors)} | expected
    files |= graph_files(twin, selftest, hashlib.sha256(files[WEIGHTS]).hexdigest())
    files[VALIDATION] = _dump(dict(validation))
    config = architecture_keys(classifier, names) | {
        "format": FORMAT,
        "version": VERSION,
        "model": classifier.name,
        "image_spec": classifier.spec.model_dump(mode="json"),
        "temperature": temperature,
        "metrics": dict(metrics),
        "data_fingerprint": data_fingerprint,
        "recipe": dict(recipe or {}),
        "parameters": models.count_parameters(classifier),
        "versions": _versions(),
    }
    files[CARD] = model_card(config, GRAPH in files).encode()
    config["files"] = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    config["sha256"] = _sha256_of(config)
    store = open_store(url)
    if store.head(CONFIG) is not None and store.get(CONFIG) != _dump(config):
        store.put(CONFIG, _dump({"format": FORMAT, "version": VERSION, "incomplete": True, "metrics": {}}))
    for path, data in files.items():
        store.put(path, data)
    store.put(CONFIG, _dump(config))
    return load(store.url)


def load(url: str) -> Bundle:
    """Read a bundle, check every file's digest before it is parsed, and repeat the self-test.

    Warns if this machine makes other pixels than the one that saved the bundle.

    Raises:
        BundleError: there is no whole bundle, a byte was changed, or a logit or a best class moved.
        StorageError: the store cannot be read.
    """
    store = open_store(url)
    config = _read_config(store)
    try:
        known = _Config.model_validate(config)
    except ValidationError as error:
        raise BundleError(f"{store.address(CONFIG)}: {explain(error)}") from None
    files = {path: _read_checked(store, path, digest) for path, digest in known.files.items()}
    for path in (WEIGHTS, VALIDATION, EXPECTED):
        if path not in files:
            raise BundleError(f"{store.address(CONFIG)} does not list {path}, so the bundle is incomplete")
    classifier = models.blank(known.model, len(known.label_names), known.image_spec)
    models.fill(classifier, models.parse_weights(files[WEIGHTS], WEIGHTS), store.address(WEIGHTS))
    classifier.eval().requires_grad_(False)
    selftest = run_selftest(store.address(), files, classifier, known.versions.get("decoder"))
    weights_sha256 = known.files[WEIGHTS]
    decides = {"weights": weights_sha256} | known.model_dump(
        mode="json", include={"model", "label_names", "image_spec", "temperature"}
    )
    return Bundle(
        url=store.url,
        classifier=classifier,
        class_names=known.label_names,
        spec=known.image_spec,
        temperature=known.temperature,
        digest=_sha256_of(decides),
        weights_sha256=weights_sha256,
        pixel_digest=hashlib.sha256(selftest.pixels.tobytes()).hexdigest(),
        config=config,
        validation=json.loads(files[VALIDATION]),
        selftest=selftest,
        graph=files.get(GRAPH),
    )


def check_classes(bundle: Bundle, class_names: Sequence[str]) -> None:
    """See that the bundle knows every class of some data; order and number may differ, names decide.

    Raises:
        BundleError: the first class that the bundle does not know.
    """
    known = set(bundle.class_names)
    for name in class_names:
        if name not in known:
            shown = ", ".join(bundle.class_names[:5]) + (", ..." if len(bundle.class_names) > 5 else "")
            raise BundleError(
                f"{bundle.url} was not made for this data: it does not know the class {name!r}, but {shown}"
            )


def check_names(names: tuple[str, ...], num_classes: int) -> None:
    """BundleError unless there is one name for each output, and no name twice."""
    if len(names) != num_classes:
        raise BundleError(f"{len(names)} class names for a model with {num_classes} outputs")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise BundleError(f"the class name {twice!r} stands twice; a label would not say which one it means")


def _versions() -> dict[str, str]:
    packages = ("torch", "torchvision", "numpy", "safetensors", "onnxruntime")
    return {
        "raycnn": raycnn.__version__,
        "python": platform.python_version(),
        "decoder": images.DECODER,
    } | {package: metadata.version(package) for package in packages}


def _dump(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sha256_of(value: Mapping[str, Any]) -> str:
    """sha256 of a value as canonical JSON, without the key that holds the result."""
    rest = {k: v for k, v in value.items() if k != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _dump_weights(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save as dump

    return dump(tensors, metadata={"format": "pt"})


def _read_config(store: Store) -> dict[str, Any]:
    try:
        data = store.get(CONFIG)
    except ObjectMissing:
        raise BundleError(f"{store.address()} is no bundle: it has no {CONFIG}") from None
    try:
        config = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{store.address(CONFIG)} is not readable as JSON ({error}); save the bundle again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BundleError(f"{store.address()} is no raycnn bundle; make one with `raycnn train` or `raycnn import`")
    if config.get("version") != VERSION:
        raise BundleError(
            f"{store.address()} has bundle format {config.get('version')}, this raycnn reads {VERSION}; upgrade raycnn"
        )
    if config.get("incomplete"):
        raise BundleError(f"{store.address()} is incomplete: saving it was cut short; run that command again")
    if config.get("sha256") != _sha256_of(config):
        raise BundleError(f"{store.address(CONFIG)} was altered after it was saved; save the bundle again")
    return config


def _read_checked(store: Store, path: str, digest: str) -> bytes:
    if path.startswith("/") or ".." in path.split("/"):
        raise BundleError(f"{store.address(CONFIG)} lists a file outside the bundle: {path}")
    try:
        data = store.get(path)
    except ObjectMissing:
        raise BundleError(f"{store.address(path)} is missing; copy the whole bundle again") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise BundleError(f"{store.address(path)} was altered after it was saved; copy the whole bundle again")
    return data
