"""What the driver has to know of a bundle. A worker reads it, because torch takes seconds to import."""

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raycnn.config import LabelConfig

if TYPE_CHECKING:
    from raycnn.bundle import Bundle

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Facts:
    """Of a bundle that has passed its self-test."""

    class_names: tuple[str, ...]
    image: dict[str, Any]
    """The model's input, as JSON."""
    temperature: float
    digest: str
    weights_sha256: str
    pixel_digest: str
    validation: dict[str, Any]
    warnings: tuple[str, ...] = ()
    """What loading it has warned of."""


def facts_of(bundle: "Bundle") -> Facts:
    """What stands in a loaded bundle."""
    return Facts(
        class_names=bundle.class_names,
        image=bundle.spec.model_dump(mode="json"),
        temperature=bundle.temperature,
        digest=bundle.digest,
        weights_sha256=bundle.weights_sha256,
        pixel_digest=bundle.pixel_digest,
        validation=bundle.validation,
    )


def read_facts(url: str) -> Facts:
    """Load a bundle, whose self-test runs here, for what a driver has to know of it.

    Raises:
        BundleError: there is no whole bundle, or it behaves otherwise here.
    """
    from raycnn import bundle as bundles

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = facts_of(bundles.load(url))
    said = (str(one.message) for one in caught if issubclass(one.category, UserWarning))
    return replace(found, warnings=tuple(dict.fromkeys(said)))


def fingerprint_of(facts: Facts, config: LabelConfig, precision: str) -> dict[str, Any]:
    """All that decides a row's content: one output holds one fingerprint."""
    return {
        "bundle": facts.digest,
        "weights": facts.weights_sha256,
        "class_names": hashlib.sha256("\n".join(facts.class_names).encode()).hexdigest(),
        "image": facts.image,
        "temperature": facts.temperature,
        "precision": precision,
        "top_k": min(config.top_k, len(facts.class_names)),
        "abstain": config.abstain,
        "embeddings": config.embeddings,
        "schema": SCHEMA_VERSION,
        "pixels": facts.pixel_digest,
    }
