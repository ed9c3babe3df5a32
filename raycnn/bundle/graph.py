"""The model as an ONNX graph, which ONNX Runtime runs faster on CPUs than torch does.

The graph takes uint8 `pixels` (N, H, W, C), normalises them itself, and gives float32 `logits` (N, classes) and
`embeddings` (N, D). It says which weights it was made from, and it is held to the bundle's self-test.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from raycnn import images
from raycnn.bundle.selftest import SelfTest
from raycnn.errors import BundleError, one_line
from raycnn.models import Classifier

GRAPH = "model.onnx"
WEIGHTS_KEY = "raycnn.weights_sha256"

_OPSET = 17
"""Old enough for ONNX Runtime since 1.12, and it has all that torchvision's architectures need."""
_LARGEST = 2**31 - 2**20
"""Bytes of weights: protobuf ends at 2 GiB, and the rest of the graph needs some room."""


class Session:
    """A graph, ready to run on the CPUs of this machine."""

    def __init__(self, graph: bytes, weights_sha256: str, threads: int) -> None:
        """Optimise the graph for this machine; `threads` is how many work on one batch.

        Raises:
            BundleError: ONNX Runtime cannot run it here, or it was made from other weights.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # what fails is raised as well
        # A thread that spins while it waits takes a CPU from the decoders beside it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with _refusals():
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        if self._session.get_modelmeta().custom_metadata_map.get(WEIGHTS_KEY) != weights_sha256:
            raise BundleError(f"{GRAPH} was made from other weights")
        self.name = f"onnxruntime {onnxruntime.__version__} cpu"

    def __call__(self, pixels: images.Pixels, with_embeddings: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits (N, classes) and, if wanted, embeddings (N, D) of pixels (N, H, W, C); both float32, N > 0."""
        wanted = ["logits", "embeddings"] if with_embeddings else ["logits"]
        found = [torch.from_numpy(values) for values in self._session.run(wanted, {"pixels": pixels})]
        return found[0], found[1] if with_embeddings else None

    def check(self, selftest: SelfTest) -> None:
        """Repeat the self-test.

        Raises:
            BundleError: a logit or a best class moved, or not every size of batch can be run.
        """
        # The first image alone, so that a graph for one size of batch is not taken for one of any.
        parts = [part for part in (selftest.pixels[:1], selftest.pixels[1:]) if len(part)]
        with _refusals():
            found = [self(part)[0] for part in parts]
        if [len(logits) for logits in found] != [len(part) for part in parts]:
            raise BundleError(f"{GRAPH} was made for another size of batch")
        logits = torch.cat(found)
        if moved := selftest.difference(logits):
            raise BundleError(f"{GRAPH} differs from torch: {moved}")


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What ONNX Runtime raises, which has no class in common, as a BundleError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as ort  # pyright: ignore[reportAttributeAccessIssue]

    failed = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NotImplemented)
    try:
        yield
    except (*failed, ort.RuntimeException, RuntimeError) as error:
        raise BundleError(f"onnxruntime cannot run {GRAPH}: {one_line(error)}") from None


def graph_files(classifier: Classifier, selftest: SelfTest, weights_sha256: str) -> dict[str, bytes]:
    """The graph of a classifier (on the CPU, in evaluation mode) under its name, checked; or none, and a warning."""
    try:
        graph = _export(classifier, weights_sha256)
        Session(graph, weights_sha256, torch.get_num_threads()).check(selftest)
    except BundleError as error:
        warnings.warn(
            f"{classifier.name}: the bundle has no {GRAPH}, so CPUs will run it in torch, which is slower: {error}",
            stacklevel=4,
        )
        return {}
    return {GRAPH: graph}


class _WithEmbeddings(nn.Module):
    """A classifier with two outputs, as the exporter calls it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # The exporter turns this on for itself, and would then print all of a graph that it cannot export.
        torch._C._jit_set_onnx_log_enabled(False)
        return self.classifier.votes_and_embeddings(pixels)


def _export(classifier: Classifier, weights_sha256: str) -> bytes:
    """The graph, which is the same for the same weights; BundleError if the architecture has none."""
    import onnx

    if sum(values.nbytes for values in classifier.state_dict().values()) > _LARGEST:
        raise BundleError("its weights do not fit into one ONNX file, which ends at 2 GiB")
    spec, names, sink = classifier.spec, ("pixels", "logits", "embeddings"), io.BytesIO()
    example = torch.zeros((2, spec.height, spec.width, spec.channels), dtype=torch.uint8)
    try:
        # It warns of being the older exporter.
        with warnings.catch_warnings(action="ignore"), _plain_attention():
            # By tracing: the exporter that is built on Dynamo takes 5 to 40 times as long and gives no faster graph.
            torch.onnx.export(
                _WithEmbeddings(classifier).eval(),
                (example,),
                sink,  # pyright: ignore[reportArgumentType]
                dynamo=False,
                opset_version=_OPSET,
                input_names=names[:1],
                output_names=names[1:],
                dynamic_axes={name: {0: "N"} for name in names},
            )
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"it cannot be exported: {one_line(error)}") from None
    about = onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key=WEIGHTS_KEY, value=weights_sha256)])
    # One protobuf message after another is both of them merged; so what is large needs no second copy.
    sink.seek(0, io.SEEK_END)
    sink.write(about.SerializeToString())
    return sink.getvalue()


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as the operations that it consists of: torch's fused one has no counterpart in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
