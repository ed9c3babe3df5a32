"""raycnn: from raw images in object storage to a trained CNN to a label for every one of them, on Ray.

    images --pack--> shards --train--> bundle --label--> one row per image
                                          |---evaluate-> counts
                                          `---serve----> HTTP endpoint

Each verb is a function here, taking what its schema in `raycnn.config` lists (`raycnn.label("data", "out",
bundle="run/bundle")`) and returning its report. Importing raycnn imports neither torch nor Ray.
"""

from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "pack": "pack",
    "train": "train",
    "evaluate": "evaluate",
    "label": "label",
    "verify": "verify",
    "review": "review",
    "export": "export",
    "serve": "serve",
    "import_model": "import",
    "run_demo": "demo",
}
"""Python name -> verb; where the verb is a keyword or the name of a module it has another name here."""

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "__version__",
    *_VERBS,
]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'raycnn' has no attribute {name!r}")
    from raycnn.config import VERBS, callable_verb

    return callable_verb(VERBS[_VERBS[name]], name)


def __dir__() -> list[str]:
    return sorted(__all__)
