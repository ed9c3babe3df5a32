import http.server
import io
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycnn.errors import ConfigError, ObjectChanged, ObjectMissing, StorageError
from raycnn.s3local import S3Server
from raycnn.storage import Entry, Store, aws, contains, fsspec_filesystem, open_store
from raycnn.storage.listing import Page, Query, list_ordered

AWKWARD = (
    *("a.b", "a/b", "a b", "a+b", "a%b", "a%20b", "a#b", "a?b", "a&b<c>", "a:b", "a'b", 'a"b', "a0/x", "a/0", "a-/0"),
    *("ü/ß", "日本.jpg", "é", "e\u0301", "\uffee", "\U0001f600", "~x", "*s", "[x]", "{y}", "^", "|", "Z", "=1"),
    *("b/c/d/e.jpg", "b/c.d/e", "b/c/d.e/f", "b/c!/x", "b/c d/x", "b.c", "b-c/x"),
)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(request.getfixturevalue("s3_url") if request.param == "s3" else tmp_path / "store")


def fill(store: Store, paths: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: store.put(path, path.encode()), paths))


def paths_of(store: Store, prefix: str = "") -> list[str]:
    return [entry.path for entry in store.list(prefix)]


def test_what_is_put_is_read_back_with_its_size_and_etag(store: Store):
    entry = store.put("folder/one", b"1234567")
    assert store.get("folder/one") == store.get("folder/one", if_match=entry.etag) == b"1234567"
    assert [entry] == list(store.list()) == [store.head("folder/one")]
    assert entry.size == 7
    again = store.put("folder/one", b"another")
    assert store.get("folder/one") == b"another"
    assert again.etag != entry.etag
    assert store.put("empty", b"").size == 0
    assert store.get("empty") == store.open("empty").read() == b""


def test_a_replaced_object_is_changed_and_a_gone_one_missing(store: Store):
    old = store.put("key", b"x" * 1000).etag
    reader = store.open("key")
    store.put("key", b"y" * 1000)
    reads: list[Callable[[str | None], object]] = [
        lambda etag: store.get("key", if_match=etag),
        lambda etag: store.get_ranges("key", [(0, 10)], if_match=etag),
        lambda etag: store.open("key", if_match=etag),
        lambda etag: store.stream("key", if_match=etag),
    ]
    for read in reads:
        with pytest.raises(ObjectChanged, match="key"):
            read(old)
        read(None)
    if store.is_local:
        assert reader.read() == b"x" * 1000
    else:
        with pytest.raises(ObjectChanged):
            reader.read()
    assert store.head("none") is None
    assert store.head("key/below") is None
    for path in ("none", "none/below"):
        for read in (store.get, store.open, store.stream, lambda p: store.get_ranges(p, [(0, 1)])):
            with pytest.raises(ObjectMissing, match="none"):
                read(path)


def test_one_of_sixteen_racing_creates_wins(store: Store):
    together = threading.Barrier(16)

    def create(n: int) -> bool:
        mine = pickle.loads(pickle.dumps(store))
        together.wait()
        return mine.create("plan/x", b"%d" % n)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert Counter(won) == {True: 1, False: 15}
    assert store.get("plan/x") == b"%d" % won.index(True)
    assert paths_of(store) == ["plan/x"]


def test_a_write_is_seen_whole_or_not_at_all(store: Store):
    contents = [bytes([n]) * 300_000 for n in range(2)]
    store.put("key", contents[0])
    done = threading.Event()

    def rewrite() -> None:
        for n in range(20):
            store.put("key", contents[n % 2])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(rewrite)
        while not done.is_set():
            assert store.get("key") in contents
        writing.result()
    assert paths_of(store) == ["key"]


def test_awkward_names_come_in_byte_order_and_read_back(store: Store):
    names = [*AWKWARD]
    fill(store, names)
    assert paths_of(store) == sorted(names, key=str.encode)
    for prefix in ("a", "a/", "b/c", "b/c/", "ü/", "none", "none/"):
        assert paths_of(store, prefix) == sorted(n for n in names if n.startswith(prefix))
    assert all(store.get(name) == name.encode() for name in names)
    folders, files = store.children()
    assert folders == sorted({name.split("/")[0] for name in names if "/" in name})
    assert files == sorted(name for name in names if "/" not in name)
    assert store.children("b/c") == (["d", "d.e"], [])
    assert store.children("none") == ([], [])


@pytest.mark.s3
def test_three_thousand_keys_in_large_small_and_nested_folders_are_listed_in_order(s3_url: str):
    keys = [f"{folder}/{n:05}.jpg" for folder in ("a", "a-1", "a.b", "b") for n in (0, 1, 2)]
    keys += [f"c/d/{n:05}.jpg" for n in range(1250)]
    keys += [f"c-/{n:05}.jpg" for n in range(200)] + [f"c.jpg/{n:03}/x" for n in range(30)]
    keys += [f"flat{n:05}.jpg" for n in range(1510)]
    random.Random(0).shuffle(keys)
    store = open_store(s3_url)
    fill(store, keys)
    assert paths_of(store) == sorted(keys)
    assert paths_of(store, "fla") == sorted(key for key in keys if key.startswith("fla"))
    listing = store.list()
    assert [entry.path for entry in islice(listing, 3)] == sorted(keys)[:3]
    listing.close()  # pyright: ignore[reportAttributeAccessIssue]


def serve(keys: set[str], size: int, as_tree: bool) -> Callable[[Query], Page]:
    """ListObjectsV2 with pages of `size`, in S3's order or as servers answer that walk a tree of folders."""

    def order(path: str) -> object:
        return path.rstrip("/").split("/") if as_tree else path

    def fetch(query: Query) -> Page:
        below = [key for key in keys if key.startswith(query.prefix) and order(key) > order(query.after)]  # type: ignore
        if query.by_folder:
            start = len(query.prefix)
            below = {k[: k.index("/", start) + 1] if "/" in k[start:] else k for k in below}
        items = sorted(below, key=order)  # type: ignore
        if query.token is None and len(items) % 2:  # a page may be empty, and yet not be the last
            return Page([], [], "0")
        end = int(query.token or 0) + size
        page = items[end - size : end]
        entries = [Entry(path, 1, "") for path in page if path in keys]
        return Page(entries, [path for path in page if path not in keys], str(end) if end < len(items) else None)

    return fetch


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    st.sets(st.lists(st.sampled_from(["a", "a-", "a.b", "b", "é"]), min_size=1, max_size=4).map("/".join), max_size=40),
    st.integers(2, 9),
    st.booleans(),
    st.sampled_from(["", "a", "a/", "a-/"]),
)
def test_a_listing_is_whole_and_in_order_whatever_the_pages_and_the_server_s_order(
    keys: set[str], size: int, as_tree: bool, prefix: str
):
    if as_tree:  # such a server has no object where it has a folder
        keys = {key for key in keys if not any(other.startswith(key + "/") for other in keys)}
    found = [entry.path for entry in list_ordered(serve(keys, size, as_tree), prefix)]
    assert found == sorted(key for key in keys if key.startswith(prefix))


def looked_at(keys: set[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str], int]:
    """Folders and files that an S3 store finds at the top, and how many requests that took."""
    asked: list[Query] = []
    answer = serve(keys, 1000, as_tree=False)
    monkeypatch.setattr("raycnn.storage.s3.S3Store._page", lambda _, query: asked.append(query) or answer(query))
    return *open_store("s3://bucket/in").children(), len(asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "beside"),
    [
        ("{:06}.jpg", {"labels.csv", "manifest.json"}),
        ("img_{:06}.jpg", {"img_labels.csv", "index.csv", "2017.jsonl", "zebra/1.jpg", "yak/1.jpg"}),
        ("{:06x}.jpg", {"labels.csv", "über/1.jpg"}),
        ("photo ({}).jpg", {"photos.csv", "metadata.jsonl"}),
    ],
)
def test_what_lies_behind_millions_of_images_on_one_level_is_seen_soon(
    image: str, beside: set[str], monkeypatch: pytest.MonkeyPatch
):
    spread = 16_777_216 // 30_000 if "x" in image else 1
    flat = {image.format(n * spread) for n in range(30_000)}
    folders, files, requests = looked_at(flat | beside, monkeypatch)
    assert {f"{folder}/1.jpg" for folder in folders} | (set(files) - flat) == beside
    assert files == sorted(set(files))
    assert requests <= 60
    assert len(files) < 30_000


@pytest.mark.slow
def test_class_folders_are_all_seen_however_many_files_lie_beside_them(monkeypatch: pytest.MonkeyPatch):
    keys = {f"{n:05}.json" for n in range(12_000)} | {f"c{n:04}/x.jpg" for n in range(2_500)}
    folders, _, _ = looked_at(keys, monkeypatch)
    assert folders == [f"c{n:04}" for n in range(2_500)]


@pytest.mark.s3
def test_a_folder_marker_is_listed_as_such(s3_url: str):
    store = open_store(s3_url)
    prefix = s3_url.removeprefix("s3://raycnn/")
    assert aws.find_account().request("PUT", "raycnn", f"{prefix}/folder/").status == 200
    store.put("folder/x", b"x")
    assert set(paths_of(store)) - {"folder/"} == {"folder/x"}
    assert store.children() == (["folder"], [])
    assert store.children("folder") == ([], ["x"])


def test_a_tar_is_read_through_a_seekable_file_and_through_a_stream(store: Store, tmp_path: Path):
    members = {f"{n:03}.bin": random.Random(n).randbytes(20_000 + 7 * n) for n in range(60)}
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    etag = store.put_file("x.tar", file).etag
    with store.open("x.tar", if_match=etag) as seekable, tarfile.open(fileobj=seekable) as tar:
        names = tar.getnames()
        for name in reversed(names):
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == members[name]
    assert names == list(members)
    with store.stream("x.tar") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        assert [tar.extractfile(m).read() for m in tar] == list(members.values())  # pyright: ignore


def test_a_file_reads_what_a_file_on_disk_reads(store: Store, tmp_path: Path):
    data = random.Random(0).randbytes(3_000_000)
    store.put("big", data)
    expected = io.BytesIO(data)
    rng = random.Random(1)
    with store.open("big") as file:
        for _ in range(200):
            whence = rng.choice([io.SEEK_SET, io.SEEK_END, io.SEEK_CUR])
            offset = rng.randrange(3_000_000) * (-1 if whence == io.SEEK_END else 1)
            assert file.seek(offset, whence) == expected.seek(offset, whence)
            length = rng.choice([0, 1, 100, 70_000, 600_000])
            assert file.read(length) == expected.read(length)
        file.seek(10)
        assert file.read() == data[10:]
        assert file.read(1) == file.read() == b""


def test_ranges_come_in_the_order_asked_for(store: Store):
    data = random.Random(0).randbytes(12_000_000)
    store.put("big", data)
    rng = random.Random(2)
    ranges = [(rng.randrange(11_000_000), rng.choice([0, 1, 500, 400_000])) for _ in range(60)]
    ranges += [ranges[0], (0, 12_000_000), (0, 5)]
    assert store.get_ranges("big", ranges) == [data[start : start + length] for start, length in ranges]
    assert store.get_ranges("big", []) == []
    with pytest.raises(StorageError, match="big: "):
        store.get_ranges("big", [(11_999_999, 2)])


@pytest.mark.slow
def test_a_large_file_is_uploaded_whole(store: Store, tmp_path: Path):
    data = random.Random(0).randbytes(34 * 1024 * 1024)
    file = tmp_path / "large"
    file.write_bytes(data)
    entry = store.put_file("large", file)
    assert entry == store.head("large")
    assert store.get("large", if_match=entry.etag) == data


def test_a_store_survives_pickling_and_gives_stores_below_it(store: Store):
    copy = pickle.loads(pickle.dumps(store))
    copy.child("a/b").put("c", b"1")
    assert paths_of(store) == ["a/b/c"]
    assert open_store(store.url).get("a/b/c") == open_store(store.child("a").url).get("b/c") == b"1"
    assert store.child("a").address("b") == store.address("a/b") == f"{store.url}/a/b"


def test_an_fsspec_file_system_reads_and_writes_the_same_objects(store: Store):
    store.put("a.txt", b"1")
    system, root = fsspec_filesystem(store.url)
    assert system.cat_file(f"{root}/a.txt") == b"1"
    with system.open(f"{root}/b.txt", "wb") as file:
        file.write(b"2")
    assert store.get("b.txt") == b"2"
    store.put("c.txt", b"3")
    assert sorted(path.rpartition("/")[2] for path in system.find(root)) == ["a.txt", "b.txt", "c.txt"]


def test_the_probe_accepts_a_store_that_keeps_what_it_has(store: Store):
    store.put("plan", b"1")
    store.probe_create_once("plan", b"2")
    assert store.get("plan") == b"1"


class OddServer(http.server.ThreadingHTTPServer):
    """An S3 server with faults: `script` holds what happens to the next requests of a method."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), OddHandler)
        self.objects: dict[str, bytes] = {}
        self.script: dict[str, list[str]] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.conditional = True


class OddHandler(http.server.BaseHTTPRequestHandler):
    server: OddServer
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        fault = next(iter(self.server.script.get(self.command, [])), "")
        if fault:
            self.server.script[self.command].pop(0)
        put, exists = self.command == "PUT", self.path in self.server.objects
        refused = exists and self.server.conditional and self.headers.get("if-none-match") == "*"
        if put and not fault.isdigit() and not refused:
            self.server.objects[self.path] = data
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault:
            self.answer(int(fault))
        elif put:
            self.answer(412 if refused else 200)
        elif exists or "?" in self.path:
            self.answer(200, self.server.objects.get(self.path, b"<html/>"))
        else:
            self.answer(404)

    do_GET = do_HEAD = do_PUT = handle_one  # noqa: N815

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Sun, 01 Jan 2023 00:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    with OddServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "unused")


@pytest.mark.slow
def test_the_probe_refuses_a_store_that_ignores_the_condition(odd: OddServer):
    odd.conditional = False
    store = open_store("s3://bucket/out")
    store.put("plan", b"1")
    refusal = r"^s3://bucket/out: .*If-None-Match.*\?single_driver.*--single-driver.*$"
    with pytest.raises(StorageError, match=refusal):
        store.probe_create_once("plan", b"1")
    odd.script["PUT"] = ["501"] * 100
    with pytest.raises(StorageError, match=refusal):
        store.probe_create_once("plan", b"1")


@pytest.mark.parametrize("answer", ["ignored", "501"])
def test_a_promise_that_nobody_else_writes_does_without_the_condition(odd: OddServer, answer: str):
    odd.conditional = False
    store = open_store(open_store("s3://bucket/out?requester_pays").single_driver().url)
    assert store.url == "s3://bucket/out?requester_pays&single_driver"
    for mine in (store, pickle.loads(pickle.dumps(store.child("below")))):
        assert mine.create("plan", b"1")
        assert not mine.create("plan", b"2")
        mine.probe_create_once("plan", b"1")
        assert mine.get("plan") == b"1"
    assert not [headers for method, _, headers in odd.seen if method == "PUT" and "if-none-match" in headers]


def test_on_a_local_folder_the_promise_changes_nothing(tmp_path: Path):
    store = open_store(tmp_path).single_driver()
    assert (store.create("x", b"1"), store.create("x", b"2")) == (True, False)


@pytest.mark.slow
def test_a_create_whose_answer_was_lost_is_repeated_and_leaves_one_object(odd: OddServer):
    store = open_store("s3://bucket/out")
    odd.script["PUT"] = ["drop"]
    assert not store.create("part", b"mine")
    assert odd.objects == {"/bucket/out/part": b"mine"}
    odd.script["PUT"] = ["503", "500", "drop"]
    store.create("next", b"mine")
    assert odd.objects["/bucket/out/next"] == b"mine"


@pytest.mark.slow
def test_a_create_that_met_a_conflict_is_repeated_until_somebody_has_created(
    odd: OddServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(aws, "RETRIES", 3)
    store = open_store("s3://bucket/out")
    odd.script["PUT"] = ["409", "409"]
    assert store.create("part", b"mine")
    odd.script["PUT"] = ["409"]
    assert not store.create("part", b"late")
    assert odd.objects == {"/bucket/out/part": b"mine"}
    odd.script["PUT"] = ["409"] * 100
    with pytest.raises(StorageError, match="409"):
        store.create("never", b"mine")


@pytest.mark.slow
def test_a_failing_server_is_asked_again(odd: OddServer):
    store = open_store("s3://bucket/out")
    odd.script["PUT"] = ["503", "drop"]
    store.put("key", b"1")
    odd.script["GET"] = ["500", "503"]
    assert store.get("key") == b"1"


def test_a_failing_server_is_not_taken_for_another_region(odd: OddServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aws, "RETRIES", 0)
    store = open_store("s3://bucket/region-3")
    for status, told in (("503", "keeps failing"), ("400", "the store refuses")):
        odd.script["GET"] = [status] * 100
        with pytest.raises(StorageError, match=rf"^s3://bucket/region-3/x: .*{told}") as caught:
            store.get("x")
        assert "AWS_REGION" not in str(caught.value)
    odd.script["GET"] = ["301"] * 100
    with pytest.raises(StorageError, match="set AWS_REGION to its region"):
        store.get("x")


@pytest.mark.slow
def test_no_password_is_told(monkeypatch: pytest.MonkeyPatch):
    store = open_store("s3://bucket/in")
    for endpoint in ("http://user:HUSH@127.0.0.1:1", "user:HUSH@127.0.0.1:1"):
        at(monkeypatch, endpoint)
        for ask in (lambda: store.get("x"), lambda: list(store.list())):
            with pytest.raises(StorageError, match=r"127\.0\.0\.1:1") as caught:
                ask()
            assert "HUSH" not in str(caught.value)
    for url in ("s3://KEY:HUSH@bucket/x", "s3://KEY:HU/SH@bucket/x?anonymus", "gs://KEY:HUSH@bucket"):
        with pytest.raises(ConfigError, match="s3://") as caught:
            open_store(url)
        assert "HU" not in str(caught.value)


def test_options_of_the_url_decide_who_asks_and_who_pays(odd: OddServer):
    url = "s3://bucket/in?anonymous"
    assert open_store(url).url == url
    assert open_store(url).address("x") == "s3://bucket/in/x"
    asked: dict[str, list[dict[str, str]]] = {}
    for option in ("", "?anonymous", "?requester_pays"):
        store = pickle.loads(pickle.dumps(open_store(f"s3://bucket/in{option}").child("below")))
        with pytest.raises(ObjectMissing):
            store.get("x")
        with pytest.raises(StorageError, match="no S3 listing"):
            list(store.list())
        asked[option] = [headers for _, path, headers in odd.seen if "below" in path]
        odd.seen.clear()
    assert all(len(requests) == 2 for requests in asked.values())
    assert all("authorization" in headers for option in ("", "?requester_pays") for headers in asked[option])
    assert all("authorization" not in headers for headers in asked["?anonymous"])
    assert all("x-amz-request-payer" not in headers for option in ("", "?anonymous") for headers in asked[option])
    assert all(headers["x-amz-request-payer"] == "requester" for headers in asked["?requester_pays"])


@pytest.mark.slow
def test_an_unreachable_endpoint_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch):
    at(monkeypatch, "http://127.0.0.1:1")
    store = open_store("s3://bucket/in")
    for ask in (lambda: list(store.list()), lambda: store.get("x"), lambda: store.create("x", b"")):
        begin = time.monotonic()
        with pytest.raises(StorageError, match=r"^cannot reach http://127.0.0.1:1 .*refused.*AWS_ENDPOINT_URL.*$"):
            ask()
        assert time.monotonic() - begin < 5


@pytest.mark.slow
def test_an_endpoint_that_accepts_and_says_nothing_is_given_up_soon(monkeypatch: pytest.MonkeyPatch):
    assert 2 * aws.FIRST_SECONDS < 10
    monkeypatch.setattr(aws, "FIRST_SECONDS", 1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        at(monkeypatch, f"http://127.0.0.1:{mute.getsockname()[1]}")
        store = open_store("s3://bucket/in")
        begin = time.monotonic()
        with ThreadPoolExecutor() as pool:
            for asked in [pool.submit(store.get, "x"), pool.submit(lambda: list(store.list()))]:
                with pytest.raises(StorageError, match="cannot reach"):
                    asked.result()
        assert time.monotonic() - begin < 4


@pytest.mark.s3
def test_wrong_credentials_and_buckets_are_named_in_one_line(s3_url: str, monkeypatch: pytest.MonkeyPatch):
    store = open_store(s3_url)
    store.put("x", b"")
    nowhere = open_store("s3://nowhere/in")
    for ask in (lambda: list(nowhere.list()), lambda: nowhere.get("x"), lambda: nowhere.put("x", b"")):
        with pytest.raises(StorageError, match=r"^no such bucket: s3://nowhere; [^\n]*$") as caught:
            ask()
        assert not isinstance(caught.value, ObjectMissing)
    with pytest.raises(StorageError, match=r"^access denied to s3://[^\n]*$"):
        open_store(s3_url + "?anonymous").get("x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "wrong")
            for ask in (lambda: list(store.list()), lambda: store.get("x"), lambda: store.create("y", b"")):
                with pytest.raises(StorageError, match=f"^{s3_url}.* refuses the credentials .*{name}[^\n]*$"):
                    ask()
            with pytest.raises(StorageError, match="AWS_PROFILE"):
                store.head("x")


@pytest.mark.s3
def test_a_profile_gives_endpoint_and_credentials_that_are_renewed(
    s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls = tmp_path / "calls"
    program = tmp_path / "keys.py"
    program.write_text(
        "import datetime, json\n"
        f"open({str(calls)!r}, 'a').write('x')\n"
        "soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=1)\n"
        f"print(json.dumps({{'Version': 1, 'AccessKeyId': {s3.access_key!r}, 'SecretAccessKey': "
        f"{s3.secret_key!r}, 'Expiration': soon.isoformat()}}))\n"
    )
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n"
        f"credential_process = {sys.executable} {program}\n"
    )
    for name in s3.environment():
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    store = open_store(s3_url)
    store.put("x", b"1")
    assert paths_of(store) == ["x"]
    before = len(calls.read_text())
    assert paths_of(store) == ["x"]
    assert len(calls.read_text()) > before
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(StorageError, match=r"other.*AWS_PROFILE"):
        store.get("x")


@pytest.mark.s3
def test_a_forked_process_is_told_instead_of_hanging(s3_url: str):
    script = (
        "import os, sys\nfrom raycnn.storage import open_store\n"
        "store = open_store(sys.argv[1])\nstore.put('x', b'1')\n"
        "child = os.fork()\n"
        "if child: os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "store.get('x')\n"
    )
    command = [sys.executable, "-c", script, s3_url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 1
    assert "spawn" in done.stderr.splitlines()[-1]


@pytest.mark.s3
def test_a_key_that_cannot_be_addressed_is_named_with_the_way_out(s3_url: str):
    for key in ("a//b", "../a", "a/", "", "a\nb"):
        with pytest.raises(StorageError, match="--exclude"):
            open_store(s3_url).get(key)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("s3://b/in", "s3://b/in", True),
        ("s3://b/in/", "s3://b/in/out?anonymous", True),
        ("s3://b/in", "s3://b/input", False),
        ("s3://b", "s3://b/out", True),
        ("s3://b/in", "s3://c/in/out", False),
        ("/data", "s3://data/in", False),
        ("/data/in", "file:///data/in/out", True),
        ("/data/in", "/data/in/../out", False),
        ("/", "/data", True),
        (".", "out", True),
    ],
)
def test_an_output_inside_its_input_is_found(outer: str, inner: str, expected: bool):
    assert contains(outer, inner) is expected


def test_an_output_inside_its_input_is_found_through_links(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert contains(str(tmp_path / "data"), str(tmp_path / "link" / "out"))


def test_urls_are_checked_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for url, expected in {
        "gs://bucket/x": "s3://",
        "https://bucket.s3.amazonaws.com/x": "s3://",
        "s3:///x": "bucket",
        "s3://bucket/a//x": "empty",
        "s3://bucket/x?anonymus": "did you mean 'anonymous'",
        "": "folder",
    }.items():
        with pytest.raises(ConfigError, match=expected):
            open_store(url)
    assert open_store("s3://bucket/what?/x/").url == "s3://bucket/what?/x"
    assert open_store(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    monkeypatch.chdir(tmp_path)
    assert open_store("./a/../b/").url == f"{tmp_path}/b"


def test_links_in_a_folder_are_followed_but_not_for_ever(tmp_path: Path):
    (tmp_path / "root/sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/y").write_bytes(b"yy")
    (tmp_path / "root/sub/x").write_bytes(b"x")
    (tmp_path / "root/sub/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/file").symlink_to(tmp_path / "outside/y")
    (tmp_path / "root/folder").symlink_to(tmp_path / "outside")
    (tmp_path / "root/gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "root/pipe")
    store = open_store(tmp_path / "root")
    assert {e.path: e.size for e in store.list()} == {"file": 2, "folder/y": 2, "gone": 0, "sub/x": 1}
    for path in ("gone", "pipe", "sub"):
        assert store.head(path) is None
        with pytest.raises(ObjectMissing):
            store.get(path)


def test_a_local_store_says_what_is_wrong_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "latin").mkdir()
    store = open_store(tmp_path)
    for path in ("../x", "/etc/passwd", "a/../../x", "\0"):
        with pytest.raises(StorageError, match="below this folder"):
            store.get(path)
    for write in (store.put, store.create):
        with pytest.raises(StorageError, match="file/x"):
            write("file/x", b"")
        with pytest.raises(StorageError, match="latin"):
            write("latin", b"")
    with pytest.raises(StorageError, match="is a file"):
        list(open_store(tmp_path / "file").list())
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin/caf\xe9")).write_bytes(b"")
    with pytest.raises(StorageError, match=r"latin.*caf.*not UTF-8; rename"):
        list(store.list())
    assert list(open_store(tmp_path / "none").list()) == []


@pytest.mark.slow
def test_a_write_that_was_killed_leaves_nothing_that_is_listed(tmp_path: Path):
    script = (
        "import os, sys, raycnn.storage.local as local\n"
        "local._sync = os.fsync = lambda *_: os.kill(os.getpid(), 9)\n"
        "local.LocalStore(sys.argv[1]).put('key', b'half')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir())
    assert paths_of(open_store(tmp_path)) == []
    assert open_store(tmp_path).create("key", b"whole")


FULL_DISK = """
import resource, sys
from pathlib import Path
from raycnn.errors import StorageError
from raycnn.storage import open_store
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
store = open_store(folder)
store.put("key", b"old")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
(source := Path(sys.argv[3])).exists() or source.write_bytes(b"")
for write in (store.put, store.create):
    for path in ("key", "sub/new"):
        if write == store.create and path == "key":
            continue
        try:
            write(path, bytes(1 << 20))
            sys.exit("written")
        except StorageError as error:
            print(error)
assert store.get("key") == b"old", store.get("key")
assert [p for p in folder.rglob("*") if p.is_file()] == [folder / "key"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["size limit", "tmpfs"])
def test_a_full_disk_leaves_the_old_object_and_nothing_half_written(how: str, tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [sys.executable, "-c", FULL_DISK, str(folder), "0" if how == "tmpfs" else "65536", str(tmp_path / "s")]
    if how == "tmpfs":
        inside = 'mount -t tmpfs -o size=256k none "$0" && exec "$@"'
        apart = ["unshare", "--user", "--map-root-user", "--mount"]
        if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this system does not let us mount a small disk")
        command = [*apart, "sh", "-c", inside, str(folder), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert all(line.startswith("disk full: cannot write 1,048,576 bytes") for line in done.stdout.splitlines())


# A signal that comes just before a read begins is handled when it ends: it may not wait for ever.
SERVER = """
import os, select, sys
from pathlib import Path
from raycnn.s3local import S3Server
from raycnn.storage import open_store
with S3Server(Path(sys.argv[1]) if len(sys.argv) > 1 else None) as s3:
    os.environ.update(s3.environment())
    s3.create_bucket("kept")
    open_store("s3://kept/x").put("y", b"1")
    print(s3._process.pid, s3._dir, s3.endpoint, flush=True)
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass
"""


def end_with_parent(end: signal.Signals, *arguments: str) -> tuple[bool, str, int]:
    """Whether a server ends when its parent gets a signal, where it kept its data, and its port."""
    command = [sys.executable, "-c", SERVER, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, folder, endpoint = parent.stdout.readline().decode().split()
        parent.send_signal(end)
        parent.wait(10)
        give_up = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < give_up:
            time.sleep(0.02)
        port = int(endpoint.rpartition(":")[2])
        with socket.socket() as client:
            refused = client.connect_ex(("127.0.0.1", port)) != 0
        return refused and not Path(f"/proc/{pid}").exists(), folder, port


@pytest.mark.s3
def test_the_local_server_ends_when_its_parent_is_killed_and_the_next_one_finds_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert end_with_parent(signal.SIGKILL, str(tmp_path))[:2] == (True, str(tmp_path))
    with S3Server(tmp_path) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        assert open_store("s3://kept/x").get("y") == b"1"


@pytest.mark.s3
def test_the_local_server_ends_with_ctrl_c_and_leaves_nothing():
    ended, folder, port = end_with_parent(signal.SIGINT)
    assert ended
    assert not Path(folder).exists()
    assert not Path(f"/tmp/seaweedfs-s3-grpc-{port + 10_000}.sock").exists()


@pytest.mark.s3
def test_the_local_server_listens_on_loopback_only(s3: S3Server):
    listening = listeners(s3._process.pid)  # pyright: ignore[reportOptionalMemberAccess, reportPrivateUsage]
    assert int(s3.endpoint.rpartition(":")[2]) in [port for _, port in listening]
    assert {host for host, _ in listening} == {"127.0.0.1"}


def listeners(pid: int) -> set[tuple[str, int]]:
    """Address and port of every TCP socket that a process listens on."""
    sockets = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found: set[tuple[str, int]] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            host, port = fields[1].split(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                name = socket.inet_ntoa(bytes.fromhex(host)[::-1]) if table == "tcp" else host
                found.add((name, int(port, 16)))
    return found


@pytest.mark.slow
def test_a_missing_server_program_is_told_with_the_command_that_installs_it(tmp_path: Path):
    script = "from raycnn.s3local import S3Server\nS3Server().__enter__()"
    bare = tmp_path / "python"
    bare.symlink_to(sys.executable)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.executable = {str(bare)!r}\n{script}"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'raycnn[s3-local]'" in done.stderr
