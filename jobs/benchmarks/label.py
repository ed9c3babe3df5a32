"""All cores: labels a second by raycnn, Daft, Ray Data and a loop without a framework; and the first labels.

Photos in Parquet on a local S3 server; in turns, after a round that warms up. Rates are those of the steady state. For
Daft and Ray Data it begins when a quarter of the images is predicted, so that neither imports count nor what they
decode before their model is there. All labels are written, and all rows counted.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import RAYCNN as COMMAND
from benchmarks.measuring import last_line, local_s3, photos_of, run_peer, spread
from benchmarks.peers import NULL, Task

ROUNDS = 5
IMAGES = 4096
DISTINCT = 256
FILES = 4
GROUP_BYTES = 32 * 1024 * 1024
BUCKET, ALL, FEW = "bench", "photos", "few"
MODEL = "mobilenet_v3_small"
CLASSES = {NULL: 10, MODEL: 1000}
TIMEOUT_S = 600

IMAGES_ALONE, BARE, RAYCNN, WARM = "images alone", "bare loop", "raycnn label", "raycnn label again"
DAFT, RAY = "daft", "ray data"
PROGRAMS = {
    IMAGES_ALONE: ("bare", "images"),
    BARE: ("bare", "bare"),
    DAFT: ("daft_pipeline",),
    RAY: ("ray_pipeline",),
}
NAMES = {
    IMAGES_ALONE: "`raycnn.images` alone, one process per core",
    BARE: "a bare loop with raycnn's decoder and backend, one process per core",
    RAYCNN: "**`raycnn label`**",
    DAFT: "Daft {daft}, as in its own benchmark",
    RAY: "Ray Data {ray}, as in its documentation",
}
BARS = [(NULL, IMAGES_ALONE, 0.7), (MODEL, BARE, 0.8)]
BARS += [(model, peer, bar) for peer, bar in ((DAFT, 2.5), (RAY, 6.0)) for model in (NULL, MODEL)]
"""What `raycnn label` is held to: with this model at least so many times the rate of that contender."""
STEADY = {
    RAYCNN: "as it reports itself: its processes' rates added up, each from when it is ready to the last commit",
    IMAGES_ALONE: "from when all processes are ready to the last image",
    BARE: "from when all processes are ready to the last file written",
    DAFT: "the last three quarters of the images, to the end of write_parquet",
    RAY: "the last three quarters of the images, to the end of write_parquet",
}
"""What `images_per_s` is; `whole_images_per_s` is of the whole program, from its start to its end."""
FIRST_BARS = {"command": 15.0, "warm": 5.0}
"""Seconds to the first committed part: of the command where no Ray runs, and of a second call in a driver."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of each contender and model, how they compare, and seconds to the first part."""
    photos, source = photos_of(arguments.subject, DISTINCT)
    with local_s3(BUCKET), tempfile.TemporaryDirectory() as folder:
        about = _store(photos, ALL, IMAGES) | {"source": source}
        _store(photos, FEW, DISTINCT)
        bundles = {model: _bundle(Path(folder), model, photos[0]) for model in CLASSES}
        _turn("warm-up", _Machine(Path(folder), bundles, FEW, DISTINCT))
        machine = _Machine(Path(folder), bundles, ALL, IMAGES)
        rounds = [_turn(f"round {i + 1} of {ROUNDS}", machine) for i in range(ROUNDS)]
        cost = _null_cost(bundles[NULL])
    packages = ("daft", "ray", "onnxruntime")
    samples = {name: [samples[name] for samples in rounds] for name in rounds[0]}
    result = {
        **about,
        "rounds": ROUNDS,
        "peer_versions": {name: importlib.metadata.version(name) for name in packages},
        "null_model_us_per_image": cost,
        "images_per_s_is": STEADY,
        **summary(samples),
        "samples": samples,
    }
    sys.stderr.write(table(result))
    return result


def _store(photos: list[bytes], name: str, count: int) -> dict[str, Any]:
    """So many photos as Parquet files with the columns key and image, in row groups of 32 MiB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raycnn.storage import open_store

    store = open_store(f"s3://{BUCKET}/{name}")
    keys, encoded = [f"{i:06d}.jpg" for i in range(count)], [photos[i % len(photos)] for i in range(count)]
    rows, groups = max(1, GROUP_BYTES * count // sum(map(len, encoded))), 0
    for number in range(FILES):
        mine = slice(count * number // FILES, count * (number + 1) // FILES)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": keys[mine], "image": encoded[mine]}), sink, rows, compression="none")
        groups += -(-(mine.stop - mine.start) // rows)
        store.put(f"{number:05d}.parquet", sink.getvalue().to_pybytes())
    return {
        "images": count,
        "distinct_images": len(set(encoded)),
        "bytes": sum(map(len, encoded)),
        "files": FILES,
        "row_groups": groups,
    }


def _bundle(folder: Path, model: str, sample: bytes) -> str:
    """A bundle with random weights. The null model's graph gives every image the same logits, and reads no pixel."""
    from raycnn import bundle as bundles
    from raycnn.bundle import folder as writing
    from raycnn.config import ImageSpec
    from raycnn.models import build

    spec, classes, url = ImageSpec.model_validate({}), CLASSES[model], str(folder / model)
    classifier = build("classic" if model == NULL else model, classes, spec, seed=0)
    exported = writing.graph_files
    if model == NULL:
        import torch

        state = classifier.net.state_dict()
        state["fc.weight"].zero_()
        state["fc.bias"].copy_(torch.arange(classes))
        writing.graph_files = lambda _classifier, _selftest, weights: {writing.GRAPH: _null_graph(classes, weights)}
    try:
        bundles.save(
            url,
            classifier,
            [f"class {i}" for i in range(classes)],
            temperature=1.0,
            metrics={},
            validation={},
            samples=(sample,),
            data_fingerprint=None,
        )
    finally:
        writing.graph_files = exported
    return url


def _null_graph(classes: int, weights_sha256: str) -> bytes:
    """What `classic` computes where its last layer is only a bias, for as many images as there are pixels for."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from raycnn.bundle.graph import WEIGHTS_KEY

    constants = {"bias": np.arange(classes, dtype=np.float32)[None], "classes": np.array([classes], np.int64)}
    nodes = [
        helper.make_node("Shape", ["pixels"], ["images"], end=1),
        helper.make_node("Concat", ["images", "classes"], ["shape"], axis=0),
        helper.make_node("Expand", ["bias", "shape"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        NULL,
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 224, 224, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {WEIGHTS_KEY: weights_sha256})
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _null_cost(bundle: str) -> float:
    """Microseconds of CPU that a prediction with the null model takes, for each image of a batch."""
    import numpy as np
    import torch

    from raycnn import bundle as bundles
    from raycnn.predictor import Predictor

    torch.set_num_threads(1)
    predictor, pixels = Predictor(bundles.load(bundle)), np.zeros((64, 224, 224, 3), np.uint8)
    predictor.predict(pixels)
    start = time.process_time()
    for _ in range(200):
        predictor.predict(pixels)
    return round(1e6 * (time.process_time() - start) / 200 / len(pixels), 1)


class _Machine(NamedTuple):
    """Where the contenders find what they need, and how many images those are."""

    folder: Path
    bundles: Mapping[str, str]
    source: str
    images: int

    def task(self, model: str) -> Task:
        """A new output for a contender."""
        name = uuid.uuid4().hex
        source, out = f"s3://{BUCKET}/{self.source}", f"s3://{BUCKET}/out/{name}"
        return Task(source, out, self.bundles[model], model, str(self.folder / name))

    def rates(self, wall: float) -> dict[str, float]:
        """What the whole program makes of its images."""
        return {"whole_images_per_s": round(self.images / wall, 1), "wall_s": round(wall, 2)}


def _turn(title: str, machine: _Machine) -> dict[str, dict[str, Any]]:
    """One sample of each contender and model, under `contender, model`."""
    samples: dict[str, dict[str, Any]] = {}
    for name, sample in _round(machine):
        sys.stderr.write(f"{title}: {name}: {json.dumps(sample)}\n")
        samples[name] = sample
    return samples


def _round(machine: _Machine) -> Iterator[tuple[str, dict[str, Any]]]:
    yield f"{IMAGES_ALONE}, {NULL}", _peer(machine, IMAGES_ALONE, NULL)
    for model in CLASSES:
        for contender in (BARE, DAFT, RAY):
            yield f"{contender}, {model}", _peer(machine, contender, model)
        yield f"{RAYCNN}, {model}", _command(machine, model)
    yield f"{WARM}, {MODEL}", _warm(machine)


def _peer(machine: _Machine, contender: str, model: str) -> dict[str, Any]:
    """The steady and the whole rate of one run of a peer."""
    task, (program, *rest) = machine.task(model), PROGRAMS[contender]
    start = time.time()
    report = run_peer(program, task._asdict(), TIMEOUT_S, *rest)
    wall = time.time() - start
    if contender != IMAGES_ALONE:
        _count_rows(task.out, machine.images)
    rate = (machine.images - report["before"]) / (report["ended"] - report["began"])
    return {"images_per_s": round(rate, 1), **machine.rates(wall)}


def _command(machine: _Machine, model: str) -> dict[str, Any]:
    """The rates of one run of `raycnn label`, which starts Ray itself, and its seconds to the first part."""
    from benchmarks.peers.warm import first_part

    task = machine.task(model)
    program = [COMMAND, "label", task.source, task.out]
    is_over, start = threading.Event(), time.time()
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(first_part, task.out, is_over)
        try:
            printed = last_line([*program, "--bundle", task.bundle, "--json"], TIMEOUT_S)
        finally:
            is_over.set()
        first = seen.result()
    wall = time.time() - start
    _verify(task.out, machine.images)
    assert first is not None
    speed = printed["speed"]
    return {
        "images_per_s": speed["images_per_s"],
        **machine.rates(wall),
        "first_part_s": round(first - start, 2),
        "speed": speed,
    }


def _warm(machine: _Machine) -> dict[str, Any]:
    task = machine.task(MODEL)
    report = run_peer("warm", task._asdict(), TIMEOUT_S, f"s3://{BUCKET}/{FEW}")
    _verify(task.out, machine.images)
    return report


def _count_rows(out: str, images: int) -> None:
    """One row for each image, or no result."""
    import pyarrow.dataset as ds
    import pyarrow.fs

    server = pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
    keys = ds.dataset(out.removeprefix("s3://"), filesystem=server).to_table(columns=["key"])["key"].to_pylist()
    if sorted(keys) != [f"{i:06d}.jpg" for i in range(images)]:
        raise SystemExit(f"{out}: {len(keys)} rows, {len(set(keys))} of them different, for {images} images")


def _verify(out: str, images: int) -> None:
    import raycnn

    proof = raycnn.verify(out)
    if proof.error or proof.present != images or proof.status != {"ok": images}:
        raise SystemExit(f"{out}: {proof}")


def summary(samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and spreads, and how raycnn compares with the others, from the samples under `contender, model`."""

    def of(name: str, value: str) -> dict[str, float]:
        return spread([sample[value] for sample in samples[name]])

    rates = {
        rate: {name: of(name, rate) for name in samples if not name.startswith(WARM)}
        for rate in ("images_per_s", "whole_images_per_s")
    }

    def times(rate: str, model: str, other: str) -> float:
        ours, theirs = rates[rate][f"{RAYCNN}, {model}"], rates[rate][f"{other}, {model}"]
        return round(ours["median"] / theirs["median"], 3)

    return {
        **rates,
        "raycnn_to": [
            {
                "contender": other,
                "model": model,
                "ratio": times("images_per_s", model, other),
                "bar": bar,
                "ratio_whole": times("whole_images_per_s", model, other),
            }
            for model, other, bar in BARS
        ],
        "first_part_s": {
            "command": of(f"{RAYCNN}, {MODEL}", "first_part_s") | {"bar": FIRST_BARS["command"]},
            "warm": of(f"{WARM}, {MODEL}", "first_part_s") | {"bar": FIRST_BARS["warm"]},
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """The README's table, in Markdown, from a result."""

    def cell(contender: str, model: str) -> str:
        rate = result["images_per_s"].get(f"{contender}, {model}")
        return f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})" if rate else ""

    def compared(contender: str, model: str) -> str:
        found = [r for r in result["raycnn_to"] if (r["contender"], r["model"]) == (contender, model)]
        return f"{found[0]['ratio']:.2f} (at least {found[0]['bar']:g})" if found else ""

    lines = [
        f"| images/s, median of {result['rounds']} (least to most) | null model | {MODEL} | raycnn / this, null "
        f"| raycnn / this, {MODEL} |",
        "|---|---|---|---|---|",
    ]
    for contender, name in NAMES.items():
        cells = [form(contender, model) for form in (cell, compared) for model in CLASSES]
        lines.append(f"| {name.format(**result['peer_versions'])} | {' | '.join(cells)} |")
    first = {
        where: f"{found['median']:.1f} s (at most {found['bar']:g})" for where, found in result["first_part_s"].items()
    }
    lines += [
        "",
        f"The first labels are committed {first['command']} after the command where no Ray runs, and {first['warm']} "
        "after a second call in one driver.",
    ]
    return "\n".join(lines) + "\n"
