"""Labels for other tools: few large files, every row once, and what joins them to their source."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from label_output import CLASSES, make_labels, png

import raycnn
from raycnn import exchange
from raycnn.errors import ConfigError, DataError, Status
from raycnn.shards import PackedRow, write_shard
from raycnn.storage import open_store


def fill(folder: Path, names: Sequence[str]) -> str:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(i))
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> str:
    return fill(tmp_path / "photos", [f"{i:03d}.png" for i in range(40)])


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """About three parts a file."""
    monkeypatch.setattr(exchange, "FILE_BYTES", 9_000)
    monkeypatch.setattr(exchange, "GROUP_BYTES", 500)


def etags(url: str) -> dict[str, str]:
    return {e.path: e.etag for e in open_store(url).list()}


def rows_of(url: str) -> list[dict]:
    return [row for file in sorted(Path(url).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.usefixtures("small_files")
def test_every_row_is_exported_once_in_the_order_of_the_plan(photos, tmp_path):
    out, dst = str(tmp_path / "labels"), str(tmp_path / "exported")
    ledger = make_labels(photos, out)
    report = raycnn.export(out, dst)
    rows = rows_of(dst)
    assert [r["key"] for r in rows] == [f"{i:03d}.png" for i in range(40)]
    assert report.rows == len(rows) == ledger.plans()[0].rows
    assert 2 <= report.files == report.files_written < 10
    parts = [r for ref in ledger.plans()[0].refs for r in pq.read_table(Path(out, ledger.path(ref))).to_pylist()]
    assert rows == parts
    metadata = pq.read_schema(next(Path(dst).glob("*.parquet"))).metadata
    assert metadata == {b"bundle": b"b1", b"decoder": b"d0, d1", b"source": photos.encode()}


@pytest.mark.usefixtures("small_files")
def test_the_success_marker_proves_the_files(photos, tmp_path):
    out, dst = str(tmp_path / "labels"), tmp_path / "exported"
    make_labels(photos, out)
    report = raycnn.export(out, str(dst))
    marker = json.loads((dst / "_SUCCESS-g0000.json").read_text())
    assert (marker["rows"], marker["status"]) == (40, {"empty": 10, "ok": 30})
    assert sorted(f["path"] for f in marker["files"]) == sorted(f.name for f in dst.glob("*.parquet"))
    assert sum(f["bytes"] for f in marker["files"]) == report.bytes
    for file in marker["files"]:
        assert hashlib.sha256((dst / file["path"]).read_bytes()).hexdigest() == file["sha256"]
        assert pq.read_metadata(dst / file["path"]).num_rows == file["rows"]


@pytest.mark.usefixtures("small_files")
def test_an_export_that_was_interrupted_goes_on_and_one_that_is_done_writes_nothing(photos, tmp_path, monkeypatch):
    out, dst = str(tmp_path / "labels"), str(tmp_path / "exported")
    make_labels(photos, out)

    def stop(event: dict) -> None:
        if event["done"] > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exchange.export(exchange.ExportConfig(out=out, dst=dst), progress=stop)
    begun = etags(dst)
    assert len(begun) == 2
    report = raycnn.export(out, dst)
    assert report.files_written == report.files - 1
    assert len(rows_of(dst)) == 40
    whole = etags(dst)
    assert begun.items() <= whole.items()
    assert raycnn.export(out, dst).files_written == 0
    assert etags(dst) == whole


def test_labels_that_have_grown_add_files_and_a_new_place_gets_all_in_one(photos, tmp_path):
    out, dst = str(tmp_path / "labels"), str(tmp_path / "exported")
    make_labels(photos, out)
    raycnn.export(out, dst)
    before = etags(dst)
    fill(tmp_path / "photos", ["new1.png", "new2.png"])
    make_labels(photos, out)
    report = raycnn.export(out, dst)
    assert (report.rows, report.files, report.files_written) == (42, 2, 1)
    assert before.items() <= etags(dst).items()
    assert sorted(r["key"] for r in rows_of(dst)) == sorted(e.path for e in open_store(photos).list())
    assert raycnn.export(out, str(tmp_path / "anew")).files == 1


@pytest.mark.slow
def test_embeddings_are_a_column_where_they_are_asked_for(photos, tmp_path):
    out, dst = str(tmp_path / "labels"), str(tmp_path / "exported")
    make_labels(photos, out, embeddings=True)
    raycnn.export(out, dst, embeddings=True)
    table = pq.read_table(dst)
    assert table.schema.field("embedding").type == pa.list_(pa.float16())
    assert table["embedding"].to_pylist()[34:] == [[8.0] * 6] * 2 + [None] + [[9.0] * 6] * 3
    found = duckdb.execute(
        f"SELECT embedding::FLOAT[] FROM '{dst}/*.parquet' WHERE status = 'ok' ORDER BY key"
    ).fetchall()
    assert [e for (e,) in found] == [[float(unit)] * 6 for unit in range(10) for _ in range(3)]
    with pytest.raises(ConfigError, match="holds an export of labels with embeddings"):
        raycnn.export(out, dst)
    raycnn.export(out, str(tmp_path / "without"))
    assert "embedding" not in pq.read_schema(next((tmp_path / "without").glob("*.parquet"))).names


def test_embeddings_that_were_altered_are_not_exported(photos, tmp_path):
    out = str(tmp_path / "labels")
    ledger = make_labels(photos, out, embeddings=True)
    one, other = (Path(out, ledger.embeddings_path(ref)) for ref in ledger.plans()[0].refs[1:3])
    for content in (b"", one.read_bytes()[:-9], other.read_bytes()):
        one.write_bytes(content)
        with pytest.raises(DataError, match="the embeddings of part-g0000-000001: what is there was altered"):
            raycnn.export(out, str(tmp_path / "exported"), embeddings=True)


def test_embeddings_that_were_not_made_cannot_be_exported(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    with pytest.raises(DataError, match=r"part-g0000-000000\.parquet is not there; label with --embeddings"):
        raycnn.export(str(tmp_path / "labels"), str(tmp_path / "exported"), embeddings=True)
    assert not (tmp_path / "exported").exists()


def test_what_is_not_finished_or_was_altered_is_not_exported(photos, tmp_path):
    out = tmp_path / "labels"
    ledger = make_labels(photos, str(out))
    marker = (out / "_SUCCESS-g0000.json").rename(tmp_path / "marker")
    with pytest.raises(DataError, match="generation 0 are not finished; run the same `raycnn label`"):
        raycnn.export(str(out), str(tmp_path / "exported"))
    content = json.loads(marker.rename(out / "_SUCCESS-g0000.json").read_text())
    for altered in ({"plan": "0" * 64}, {"version": 1}):
        (out / "_SUCCESS-g0000.json").write_text(json.dumps(altered if "version" in altered else content | altered))
        with pytest.raises(DataError, match=r"_SUCCESS-g0000\.json was altered"):
            raycnn.export(str(out), str(tmp_path / "exported"))
    (out / "_SUCCESS-g0000.json").write_text(json.dumps(content))
    part = out / ledger.path(ledger.plans()[0].refs[3])
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"part-g0000-000003\.parquet was altered"):
        raycnn.export(str(out), str(tmp_path / "exported"))
    for dst in (out / "exported", tmp_path, Path(photos, "exported")):
        with pytest.raises(ConfigError, match="lie inside each other"):
            raycnn.export(str(out), str(dst))
    with pytest.raises(DataError, match="no plan there"):
        raycnn.export(photos, str(tmp_path / "other"))


def test_an_export_of_other_labels_is_not_mixed_with_these(photos, tmp_path):
    make_labels(photos, str(tmp_path / "labels"))
    make_labels(photos, str(tmp_path / "others"), per_unit=5)
    raycnn.export(str(tmp_path / "labels"), str(tmp_path / "exported"))
    with pytest.raises(ConfigError, match="holds an export of other labels; export to another place"):
        raycnn.export(str(tmp_path / "others"), str(tmp_path / "exported"))


def test_one_line_of_duckdb_joins_labels_to_their_source(tmp_path, monkeypatch):
    """The line that the README shows."""
    (tmp_path / "packed" / "data").mkdir(parents=True)
    shard = tmp_path / "packed" / "data" / "train-00000-of-00001.parquet"
    groups = write_shard(shard, (PackedRow(f"{i:02d}.png", png(i), i % 3, 8, 8, Status.OK) for i in range(30)), CLASSES)
    counts = {"status": {"ok": 30}, "classes": {}}
    entry = {"path": f"data/{shard.name}", "split": "train", "rows": 30, "row_groups": groups, **counts}
    manifest = {
        "format": "raycnn-packed",
        "version": 1,
        "class_names": CLASSES,
        "splits": {"train": counts},
        "shards": [entry | {"bytes": shard.stat().st_size}],
    }
    (tmp_path / "packed" / "manifest.json").write_text(json.dumps(manifest))
    make_labels(str(tmp_path / "packed"), str(tmp_path / "labels"), per_unit=1)
    raycnn.export(str(tmp_path / "labels"), str(tmp_path / "exported"))
    monkeypatch.chdir(tmp_path)
    rows = duckdb.execute(JOIN).fetchall()
    assert sorted(key for key, *_ in rows) == [f"{i:02d}.png" for i in range(30)]
    assert all(image["bytes"] == png(int(key[:2])) for key, _, _, image in rows)


JOIN = "SELECT key, class_name, probability, image FROM 'exported/*.parquet' JOIN 'packed/data/*.parquet' USING (key)"


@pytest.mark.s3
def test_an_s3_prefix_is_exported_to_another(s3_url):
    store = open_store(f"{s3_url}/photos")
    for i in range(20):
        store.put(f"{i:02d}.png", png(i))
    make_labels(f"{s3_url}/photos", f"{s3_url}/labels", embeddings=True)
    report = raycnn.export(f"{s3_url}/labels", f"{s3_url}/exported", embeddings=True)
    assert (report.rows, report.files_written) == (20, 1)
    assert raycnn.export(f"{s3_url}/labels", f"{s3_url}/exported", embeddings=True).files_written == 0
