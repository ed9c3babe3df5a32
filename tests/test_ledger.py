"""The exactly-once protocol, without Ray: plans agree, parts are created once, and verify finds every damage."""

import hashlib
import io
import itertools
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raycnn
from raycnn.errors import ConfigError, DataError, StorageError
from raycnn.ledger import Growth, Ledger, Plan, UnitRef, label_ledger, new_slices, pages
from raycnn.shards import Slice
from raycnn.storage import open_store

FINGERPRINT = {"weights": "abc", "top_k": 5}


def slices(names: Iterator[str] | list[str]) -> list[Slice]:
    return [Slice(n, n, 10, f"etag-{n}", 0, 1, 0, 10, -1) for n in names]


def units_of(count: int, size: int = 3) -> list[list[Slice]]:
    keys = [f"{i:04d}.png" for i in range(count * size)]
    return [slices(keys[i * size : (i + 1) * size]) for i in range(count)]


def make_plan(ledger: Ledger, units: Iterable[list[Slice]], generation: int = 0) -> Plan:
    selection = {"data": "/data", "split": "all", "exclude": []}
    return ledger.plan(generation, units, selection, FINGERPRINT, Counter(hidden=2))


def part(ledger: Ledger, ref: UnitRef, keys: list[str] | None = None, made_by: str = "") -> bytes:
    keys = [s.key for s in ledger.slices(ref)] if keys is None else keys
    table = pa.table({"key": keys, "status": ["ok"] * len(keys)})
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"unit": str(ref.unit), "plan": ref.plan, "by": made_by}), sink)
    return sink.getvalue()


def finish(ledger: Ledger, plan: Plan) -> None:
    parts = []
    for ref in plan.refs:
        data = ledger.store.get(ledger.path(ref))
        digest = hashlib.sha256(data).hexdigest()
        parts.append({"path": ledger.path(ref), "bytes": len(data), "sha256": digest, "rows": ref.rows})
    ledger.finish(plan, {"status": {"ok": plan.rows}, "parts": parts})


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return label_ledger(open_store(str(tmp_path / "out")), FINGERPRINT)


@pytest.fixture
def done(ledger) -> tuple[Ledger, Plan]:
    """A finished output of 20 units with 3 rows each, on two pages."""
    plan = make_plan(ledger, units_of(20))
    for ref in plan.refs:
        assert ledger.commit(ref, part(ledger, ref), ref.rows)
    finish(ledger, plan)
    return ledger, plan


def test_a_plan_comes_back_as_it_was_made(ledger):
    units = units_of(40)
    plan = make_plan(ledger, units)
    assert plan.rows == 120
    assert [ledger.slices(ref) for ref in plan.refs] == units
    assert ledger.plans() == [plan]


def test_the_memory_of_planning_does_not_grow_with_the_collection(tmp_path, monkeypatch):
    def peak(count: int) -> int:
        ledger = label_ledger(open_store(str(tmp_path / str(count))), FINGERPRINT)
        keys = (f"{i:06d}.png" for i in range(count * 64))
        units = (slices(list(itertools.islice(keys, 64))) for _ in range(count))
        tracemalloc.start()
        make_plan(ledger, units)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    monkeypatch.setattr(pages, "PAGE_UNITS", 2)
    peak(4)
    few, many = peak(8), peak(40)
    assert (many - few) / (32 * 64) < 40, "bytes for a key; a slice has 300"


def test_the_loser_of_a_planning_race_adopts_the_winners_plan(ledger):
    def attempt(i: int) -> str:
        other = label_ledger(open_store(ledger.store.url), FINGERPRINT)
        return make_plan(other, units_of(10 + i)).digest

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(attempt, range(8)))) == 1


def test_another_model_or_another_selection_is_refused_by_name(ledger):
    plan = make_plan(ledger, units_of(2))
    with pytest.raises(ConfigError, match=r"fingerprint: top_k \(was 5, now 1\); use another output"):
        ledger.check(plan, plan.content["selection"], FINGERPRINT | {"top_k": 1})
    with pytest.raises(ConfigError, match="selection: split"):
        ledger.check(plan, plan.content["selection"] | {"split": "val"}, FINGERPRINT)


def test_a_committed_unit_is_not_pending_and_is_not_written_again(ledger):
    plan = make_plan(ledger, units_of(3))
    first, *rest = plan.refs
    assert ledger.commit(first, part(ledger, first), first.rows)
    assert not ledger.commit(first, b"a zombie's late part", first.rows)
    assert ledger.store.get(ledger.path(first)) == part(ledger, first)
    assert ledger.pending(plan) == rest
    with pytest.raises(StorageError, match="2 units are pending"):
        ledger.finish(plan, {})


def test_a_part_without_the_rows_that_were_planned_is_not_committed(ledger):
    (ref,) = make_plan(ledger, units_of(1)).refs
    with pytest.raises(DataError, match=r"0000\.png and what follows it: 2 images were read, not the 3"):
        ledger.commit(ref, part(ledger, ref, ["0000.png", "0001.png"]), 2)
    assert not ledger.is_committed(ref)


def test_a_page_that_was_altered_is_not_trusted(ledger):
    plan = make_plan(ledger, units_of(2))
    path = plan.content["pages"][0]["path"]
    ledger.store.put(path, ledger.store.get(path)[:-1] + b"x")
    with pytest.raises(DataError, match="was altered"):
        label_ledger(open_store(ledger.store.url + "/"), FINGERPRINT).slices(plan.refs[0])


def test_only_what_is_new_is_planned_again():
    planned = slices(["a", "b", "c"])
    listed = [*slices(["a"]), slices(["b"])[0]._replace(etag="other"), *slices(["d"])]
    growth = Growth()
    assert [s.key for s in new_slices(listed, planned, growth)] == ["d"]
    assert (growth.changed, growth.gone) == (1, 1)


@pytest.mark.parametrize(
    ("before", "after", "changed", "gone"),
    [
        ([("a.tar", 0, 1), ("a.tar", 1, 1)], [("a.tar", 0, 1), ("a.tar", 1, 1), ("a.tar", 2, 1)], 3, 0),
        ([("a", 0, 1000), ("a", 1000, 2000)], [("a", 0, 1500), ("a", 1500, 1500)], 3000, 0),
        ([("a", 0, 1000), ("a", 1000, 2000)], [], 0, 3000),
    ],
    ids=["a tar with one more member", "Parquet with other row groups", "gone"],
)
def test_an_object_that_has_changed_is_not_planned_again_not_even_in_part(before, after, changed, gone):
    planned = [Slice("", path, 10, "old", first, rows, 0, 10, -1) for path, first, rows in before]
    listed = [Slice("", path, 12, "new", first, rows, 0, 12, -1) for path, first, rows in after]
    growth = Growth()
    assert [s.path for s in new_slices([*listed, *slices(["b"])], planned, growth)] == ["b"]
    assert (growth.changed, growth.gone) == (changed, gone)


def test_generations_are_compared_with_a_listing_as_one(ledger):
    make_plan(ledger, [slices(["a", "d"])])
    make_plan(ledger, [slices(["b", "e"])], 1)
    growth = Growth()
    planned = ledger.planned(ledger.plans())
    assert [s.key for s in new_slices(slices(["a", "b", "c", "d", "e"]), planned, growth)] == ["c"]
    assert (growth.changed, growth.gone) == (0, 0)
    with pytest.raises(DataError, match="listed after a name that follows it"):
        list(new_slices(slices(["b", "a"]), [], growth))


def test_verify_proves_a_finished_output(done):
    ledger, _ = done
    report = raycnn.verify(ledger.store.url)
    assert (report.expected, report.present) == (60, 60)
    assert (report.lost, report.duplicate, report.foreign, report.altered) == (0, 0, 0, 0)
    assert report.status == {"ok": 60}
    assert report.error is None


def test_verify_says_that_a_run_is_not_over(ledger):
    plan = make_plan(ledger, units_of(4))
    ledger.commit(plan.refs[0], part(ledger, plan.refs[0]), 3)
    report = raycnn.verify(ledger.store.url)
    assert (report.lost, report.present) == (9, 3)
    assert "the run is not finished; run the same" in str(report.error)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("deleted", {"lost": 3}),
        ("truncated", {"lost": 3, "altered": 1}),
        ("altered", {"altered": 1}),
        ("doubled", {"foreign": 3}),
        ("foreign", {"foreign": 1}),
        ("swapped", {"lost": 3, "foreign": 3, "altered": 1, "duplicate": 3}),
        ("row dropped", {"lost": 1, "altered": 1}),
    ],
)
def test_verify_finds_every_damage(done, tmp_path, damage, found):
    ledger, plan = done
    path, other = (tmp_path / "out" / ledger.path(ref) for ref in plan.refs[3:5])
    if damage == "deleted":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "altered":
        table = pq.read_table(path)
        pq.write_table(table.append_column("label", pa.array([1, 2, 3])), path)
    elif damage == "doubled":
        (path.parent / "part-g0000-000099.parquet").write_bytes(path.read_bytes())
    elif damage == "foreign":
        (path.parent / "notes.txt").write_bytes(b"hello")
    elif damage == "swapped":
        path.write_bytes(other.read_bytes())
    elif damage == "row dropped":
        path.write_bytes(part(ledger, plan.refs[3], [s.key for s in ledger.slices(plan.refs[3])][:2]))
    report = raycnn.verify(ledger.store.url)
    clean = dict.fromkeys(("lost", "duplicate", "foreign", "altered"), 0)
    assert {k: getattr(report, k) for k in clean} == clean | found
    assert isinstance(report.error, DataError)


def test_verify_needs_an_output_of_label(tmp_path):
    (tmp_path / "x").write_text(json.dumps({}))
    with pytest.raises(DataError, match="no plan there"):
        raycnn.verify(str(tmp_path))


@pytest.mark.slow
def test_whatever_byte_of_a_part_is_altered_verify_says_so(done, tmp_path):
    ledger, plan = done
    path = tmp_path / "out" / ledger.path(plan.refs[3])
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert raycnn.verify(ledger.store.url).altered == 1, place


@pytest.mark.parametrize("path", ["plan/g0000.json", "_SUCCESS-g0000.json", "plan/pages/*.parquet"])
def test_an_output_whose_plan_or_marker_is_damaged_proves_nothing(done, tmp_path, path):
    ledger, _ = done
    (file, *_) = (tmp_path / "out").glob(path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{file.name} was altered or deleted"):
        raycnn.verify(ledger.store.url)


def test_an_output_without_its_success_marker_is_not_finished(done, tmp_path):
    ledger, _ = done
    (tmp_path / "out" / "_SUCCESS-g0000.json").unlink()
    report = raycnn.verify(ledger.store.url)
    assert report.present == report.expected == 60
    assert "the run is not finished" in str(report.error)


@pytest.fixture
def grown(done) -> tuple[Ledger, Plan]:
    """A finished output of two generations, and the plan of the second."""
    ledger, _ = done
    plan = make_plan(ledger, [slices(["new-a", "new-b", "new-c"])], 1)
    for ref in plan.refs:
        assert ledger.commit(ref, part(ledger, ref), ref.rows)
    finish(ledger, plan)
    assert raycnn.verify(ledger.store.url).present == 63
    return ledger, plan


@pytest.mark.parametrize("gone", [["plan"], ["plan", "part"], ["plan", "marker", "part of the first"]])
def test_a_generation_of_which_the_plan_is_gone_is_missed(grown, tmp_path, gone):
    ledger, plan = grown
    paths = {
        "plan": "plan/g0001.json",
        "part": ledger.path(plan.refs[0]),
        "marker": "_SUCCESS-g0001.json",
        "part of the first": ledger.path(UnitRef(0, 3, 3, "", "")),
    }
    for name in gone:
        (tmp_path / "out" / paths[name]).unlink()
    if "marker" in gone:
        report = raycnn.verify(ledger.store.url)
        assert (report.lost, report.foreign) == (3, 3)
    else:
        with pytest.raises(DataError, match=r"plan/g0001\.json was altered or deleted"):
            raycnn.verify(ledger.store.url)


def test_parts_of_a_plan_that_is_gone_are_not_taken_for_those_of_a_new_one(grown, tmp_path):
    ledger, _ = grown
    (tmp_path / "out/plan/g0001.json").unlink()
    with pytest.raises(DataError, match=r"plan/g0001\.json was altered or deleted"):
        make_plan(ledger, [slices(["new-a", "new-b"])], 1)
    assert len(ledger.plans()) == 1


@pytest.mark.parametrize("forged", ["of another generation", "without a part"])
def test_a_success_marker_that_does_not_fit_its_plan_proves_nothing(grown, tmp_path, forged):
    ledger, _ = grown
    marker = tmp_path / "out/_SUCCESS-g0000.json"
    content = json.loads(marker.read_text())
    if forged == "of another generation":
        marker.write_bytes((tmp_path / "out/_SUCCESS-g0001.json").read_bytes())
    else:
        marker.write_text(json.dumps(content | {"parts": content["parts"][:-1]}))
    with pytest.raises(DataError, match=r"_SUCCESS-g0000\.json was altered"):
        raycnn.verify(ledger.store.url)
