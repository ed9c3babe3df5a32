"""What others read in a bundle: config.json's keys for timm and the Hugging Face Hub, and the model card."""

from collections.abc import Mapping
from typing import Any

import yaml

from raycnn import models
from raycnn.models import Classifier

_GRAPH = """

model.onnx is the same model for ONNX Runtime: `pixels`, uint8 (N, height, width, channels), become `logits` and
`embeddings`; it normalises them itself."""


def architecture_keys(classifier: Classifier, names: tuple[str, ...]) -> dict[str, Any]:
    """The keys under which timm and the Hugging Face Hub expect an architecture and its classes."""
    spec = classifier.spec
    shape = [spec.channels, spec.height, spec.width]
    return {
        "architecture": classifier.name.removeprefix(models.TIMM),
        "num_classes": len(names),
        "label_names": list(names),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "model_args": {"in_chans": spec.channels} if spec.channels != 3 else {},
        "pretrained_cfg": {
            "input_size": shape,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "interpolation": "bilinear",
            "crop_pct": spec.crop,
            "crop_mode": "center",
            "num_classes": len(names),
        },
    }


def model_card(config: Mapping[str, Any], with_graph: bool) -> str:
    """README.md: Hugging Face front matter, a table of what is in config.json, how to use it (and model.onnx)."""
    spec, names, metrics = config["image_spec"], config["label_names"], config["metrics"]
    front: dict[str, Any] = {
        "pipeline_tag": "image-classification",
        "library_name": "timm" if config["model"].startswith(models.TIMM) else "raycnn",
        "tags": ["image-classification", "raycnn", config["architecture"]],
        "metrics": ["accuracy"],
    }
    if "accuracy_top1" in metrics:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": "raycnn", "name": f"validation split of {config['data_fingerprint']}"},
            "metrics": [{"type": "accuracy", "value": metrics["accuracy_top1"]}],
        }
        front["model-index"] = [{"name": config["architecture"], "results": [result]}]
    rows = {
        "architecture": config["model"],
        "parameters": f"{config['parameters']:,}",
        "input": f"{spec['height']} x {spec['width']} px, {spec['channels']} channels, crop {spec['crop']:g}",
        "temperature": f"{config['temperature']:g}",
        **{key: f"{value:.4g}" if isinstance(value, float) else value for key, value in metrics.items()},
        "data": config["data_fingerprint"] or "not known",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    listed = "\n".join(f"{i}. {name}" for i, name in enumerate(names))
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {config['architecture']}, {len(names)} classes\n\n| | |\n|---|---|\n{table}\n\n"
        "## Use\n\nFrom the folder that holds this file:\n\n"
        "```\nraycnn label IMAGES OUT --bundle .\nraycnn serve --bundle .\n```\n\n"
        "The weights are a plain state dict of the architecture; images are scaled to [0, 1] and normalised with "
        "the mean and std\nin config.json. Probabilities are the softmax of the logits divided by the temperature."
        f"\n\n## Classes\n\n{listed}\n"
    )
