"""The hand-over folder: everything that turns an image into a label, checked when it is loaded.

    config.json         architecture, class names, image spec, temperature, checksums; written last
    model.safetensors   the architecture's own key names
    model.onnx          the same as a graph for ONNX Runtime, where the architecture can become one
    validation.json     class counts, confidence histogram, accuracy against coverage
    selftest/           encoded images, the digest of their pixels and their logits
    README.md           model card

config.json has the keys that timm and the Hugging Face Hub look for, beside raycnn's own. No pickle.
"""

from raycnn.bundle.folder import CONFIG, Bundle, check_classes, load, save
from raycnn.bundle.graph import Session
from raycnn.bundle.importing import ImportReport, import_model
from raycnn.bundle.selftest import REDUCED_TOLERANCE, TOLERANCE, SelfTest

__all__ = ["CONFIG", "REDUCED_TOLERANCE", "TOLERANCE", "Bundle", "ImportReport", "SelfTest", "Session"]
__all__ += ["check_classes", "import_model", "load", "save"]
