"""Storage and ledger before a real S3 server, with a proxy between that loses, delays, cuts and refuses."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, Rule
from test_ledger import FINGERPRINT, finish, make_plan, part, units_of

import raycnn
from raycnn.errors import StorageError
from raycnn.ledger import Plan, label_ledger
from raycnn.s3local import S3Server
from raycnn.storage import Store, aws, open_store

pytestmark = pytest.mark.s3

DATA = b"0123456789" * 10_000


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before the session's S3 server; the AWS_* variables lead to it. Nothing may delete or copy."""
    with FaultProxy(s3.endpoint) as proxy:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, proxy.endpoint)
        yield proxy
        assert proxy.refused == 0


@pytest.fixture
def store(proxy: FaultProxy, s3_url: str) -> Store:
    """An empty prefix behind the proxy; the client has been there before."""
    store = open_store(s3_url)
    assert list(store.list()) == []
    for name in ("whole", "ranged", "asked", "below/a", "below/b"):
        store.put(name, DATA)
    return store


def operations(store: Store) -> dict[str, tuple[str, Callable[[], Any], Any]]:
    """By the key that each is about: its method, what is called, and what it gives when all is well."""
    ranges = [(99_990, 10), (3, 4)]
    return {
        "whole$": ("GET", lambda: store.get("whole"), DATA),
        "ranged$": ("GET", lambda: store.get_ranges("ranged", ranges), [b"0123456789", b"3456"]),
        "asked$": ("HEAD", lambda: getattr(store.head("asked"), "size", None), len(DATA)),
        "below/$": ("LIST", lambda: [e.path for e in store.list("below/")], ["below/a", "below/b"]),
        "put$": ("PUT", lambda: store.put("put", DATA).size, len(DATA)),
        "created$": ("PUT", lambda: store.create("created", DATA), True),
    }


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results, or the StorageErrors."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except StorageError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


@pytest.mark.parametrize("fault", [503, 500, "reset", "delay", "cut", "unanswered"])
def test_what_fails_twice_is_asked_for_again(proxy: FaultProxy, store: Store, fault: Fault):
    wanted = operations(store)
    proxy.rules = tuple(Rule(fault, method, key, times=2, seconds=0.2) for key, (method, _, _) in wanted.items())
    results = dict(zip(wanted, at_once([call for _, call, _ in wanted.values()]), strict=True))
    told = Counter(seen.done for seen in proxy.requests)
    assert told[str(fault)] >= len(wanted)
    # A create that was done without an answer is found when it is tried again, as if it were another's.
    assert results == {key: right for key, (_, _, right) in wanted.items()} | {"created$": fault != "unanswered"}
    assert store.get("put") == store.get("created") == DATA


@pytest.mark.parametrize("fault", [503, 500])
def test_a_store_that_is_busy_from_the_first_request_is_waited_for(
    proxy: FaultProxy, s3_url: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_FRESH_CLIENT", proxy.endpoint)
    proxy.rules = (Rule(fault, "LIST", times=4),)
    assert list(open_store(s3_url).list()) == []
    assert [seen.done for seen in proxy.requests] == [str(fault)] * 4 + ["passed"]


def test_a_conflict_is_not_taken_for_somebody_elses_success(proxy: FaultProxy, store: Store):
    proxy.rules = (Rule(409, "PUT", times=2),)
    assert store.create("created", DATA)
    proxy.rules = (Rule(412, "PUT", times=1),)
    assert store.create("other", DATA)
    assert store.get("created") == store.get("other") == DATA


def test_a_large_upload_goes_on_where_a_part_of_it_was_cut(proxy: FaultProxy, store: Store):
    proxy.rules = (Rule("cut", "PUT", times=1, nth=2), Rule("unanswered", "PUT", times=1, nth=3))
    large = DATA * 350
    store.put("large", large)
    assert store.get("large") == large
    assert {"cut", "unanswered"} < {seen.done for seen in proxy.requests}


@pytest.mark.parametrize("fault", [503, "reset", "cut", "unanswered"])
def test_what_fails_for_good_ends_after_bounded_repetitions(
    proxy: FaultProxy, store: Store, fault: Fault, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(aws, "RETRIES", 1)
    monkeypatch.setenv("AWS_FRESH_CLIENT", proxy.endpoint)
    store.head("asked")
    wanted = {key: operation for key, operation in operations(store).items() if key != "asked$"}
    proxy.rules = (Rule(fault),)
    results = at_once([call for _, call, _ in wanted.values()])
    told = "the store keeps failing" if fault == 503 else f"cannot reach {proxy.endpoint} "
    assert [told in str(error) and "Errno" not in str(error) for error in results] == [True] * len(wanted)
    assert all(result.exit_code == 5 for result in results)
    assert max(Counter((seen.method, seen.key) for seen in proxy.requests).values()) <= 1 + 1
    proxy.rules = ()
    assert (store.head("created") is not None) == (fault == "unanswered")


@pytest.mark.parametrize(
    ("status", "told"), [(403, "access denied to .*what they may do"), (400, "credentials.* expired.*[lL]og in again")]
)
def test_credentials_that_end_in_mid_run_stop_it_at_once(proxy: FaultProxy, store: Store, status: int, told: str):
    for key, (method, call, _) in operations(store).items():
        proxy.rules = (Rule(status, method, key),)
        begun = time.monotonic()
        with pytest.raises(StorageError, match=told) as caught:
            call()
        assert caught.value.exit_code == 5
        assert time.monotonic() - begun < 2
        assert [seen.status for seen in proxy.requests if seen.method == method] == [status]


def test_a_store_that_ignores_the_condition_is_found_by_the_probe(proxy: FaultProxy, s3_url: str):
    ledger = label_ledger(open_store(s3_url), FINGERPRINT)
    plan = make_plan(ledger, units_of(2))
    ledger.probe(plan)
    proxy.rules = (Rule("unconditional", "PUT"),)
    with pytest.raises(StorageError, match="this store ignores If-None-Match"):
        ledger.probe(plan)
    alone = label_ledger(open_store(s3_url).single_driver(), FINGERPRINT)
    alone.probe(plan)
    assert alone.commit(plan.refs[0], b"first", 3)
    assert not alone.commit(plan.refs[0], b"second", 3)


def drive(url: str, count: int) -> Plan:
    """What one driver does, with two workers: plan or adopt, commit what is pending, finish."""
    ledger = label_ledger(open_store(url), FINGERPRINT)
    plan = make_plan(ledger, units_of(count))
    ledger.probe(plan)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda ref: ledger.commit(ref, part(ledger, ref), ref.rows), ledger.pending(plan)))
    finish(ledger, plan)
    return plan


@pytest.mark.parametrize("seed", range(2))
def test_two_drivers_on_a_store_where_a_quarter_of_all_goes_wrong(proxy: FaultProxy, s3_url: str, seed: int):
    faults: tuple[Fault, ...] = (503, 500, "reset", "cut", "unanswered")
    assert list(open_store(s3_url).list()) == []  # a store that has never answered is given up within seconds
    proxy.seed = seed
    proxy.rules = (
        Rule(409, "PUT", probability=0.15),
        *(Rule(fault, probability=0.05) for fault in faults),
        Rule("delay", probability=0.05, seconds=0.05),
    )
    plans = at_once([lambda: drive(s3_url, 20)] * 2)
    assert plans[0] == plans[1]
    report = raycnn.verify(s3_url)
    assert (report.expected, report.present, report.error) == (60, 60, None)
    assert {seen.done for seen in proxy.requests} >= {"passed", "409", *map(str, faults), "delay"}
    assert {seen.method for seen in proxy.requests} <= {"GET", "HEAD", "LIST", "PUT"}


def test_a_run_whose_access_ended_goes_on_when_it_has_it_again(proxy: FaultProxy, s3_url: str):
    proxy.rules = (Rule(403, "PUT", "part-", nth=7),)
    begun = time.monotonic()
    with pytest.raises(StorageError, match="access denied"):
        drive(s3_url, 20)
    assert time.monotonic() - begun < 5
    assert "the run is not finished" in str(raycnn.verify(s3_url).error)
    proxy.rules = ()
    drive(s3_url, 20)
    assert raycnn.verify(s3_url).error is None
    written = [
        seen.key for seen in proxy.requests if (seen.method, seen.status) == ("PUT", 200) and "part-" in seen.key
    ]
    assert len(written) == 20 - 6, "what was committed before is not written again"


def test_the_proxy_repeats_itself_and_lets_nothing_be_deleted(proxy: FaultProxy, s3: S3Server, store: Store):
    def faults(seed: int) -> list[str]:
        proxy.seed = seed
        proxy.rules = (Rule("delay", seconds=0, probability=0.5),)
        for name in ("whole", "ranged", "asked") * 8:
            store.head(name)
        return [seen.done for seen in proxy.requests]

    assert faults(1) == faults(1) != faults(2)
    with FaultProxy(s3.endpoint) as other, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", other.endpoint)
        patch.setenv("AWS_ENDPOINT_URL_S3", other.endpoint)
        files, place = raycnn.storage.fsspec_filesystem(store.url)
        for refused in (lambda: files.rm(f"{place}/whole"), lambda: files.copy(f"{place}/whole", f"{place}/copy")):
            with pytest.raises(PermissionError):
                refused()
        assert other.refused == 2
    assert (store.get("whole"), store.head("copy")) == (DATA, None)
