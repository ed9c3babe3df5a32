"""The kill matrix: which process is killed, at which step of `raycnn label`, and what is mended after it."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from raycnn.s3local import S3Server

if TYPE_CHECKING:
    from ray._private.node import Node

WORKERS = 2
KILLS = 3


def of_tests(module: str) -> Any:
    """A module of the repository's tests folder."""
    folder = str(Path(__file__).parents[2] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(module)


chaos = of_tests("chaos")


class Nodes:
    """A Ray cluster on this machine: a head without CPUs and nodes of one CPU each."""

    def __init__(self, folder: str) -> None:
        self._folder, self._old = folder, list[Any]()
        self.start()

    def start(self) -> None:
        """A new cluster. An older one is left as it is, until the end."""
        from ray._common.utils import get_default_ray_temp_dir
        from ray.cluster_utils import Cluster

        # Ray writes the address of its cluster there too, whatever its folder is, and does not make that folder.
        os.makedirs(get_default_ray_temp_dir(), exist_ok=True)
        if hasattr(self, "_cluster"):
            self._old.append(self._cluster)
        self._cluster = Cluster(
            True, head_node_args={"num_cpus": 0, "include_dashboard": False, "temp_dir": self._folder}
        )
        self.mend()

    @property
    def address(self) -> str:
        """HOST:PORT of the head."""
        return str(self._cluster.address)

    def mend(self) -> None:
        """Remove nodes without a raylet, and bring them to their number."""
        for node in list(self._cluster.worker_nodes):
            if not psutil.pid_exists(pid := _pid(node)) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                self._cluster.remove_node(node, allow_graceful=False)
        while len(self._cluster.worker_nodes) < WORKERS:
            self.add()

    def add(self) -> None:
        """One node more."""
        self._cluster.add_node(num_cpus=1)

    def leave(self, pid: int) -> None:
        """The node of a process ends in good order."""
        raylet = chaos.raylet_of(pid)
        self._cluster.remove_node(next(node for node in self._cluster.worker_nodes if _pid(node) == raylet))

    def count(self, actor: str) -> int:
        """Processes of such actors, on all nodes."""
        return sum(len(_running(actor, node)) for node in self._cluster.worker_nodes)

    def drain(self, actor: str) -> None:
        """Give notice that a node with such an actor will be taken away, as a cloud does of a spot instance."""
        node = next(node for node in self._cluster.worker_nodes if _running(actor, node))
        where = ["--address", self.address, "--node-id", node.node_id, "--deadline-remaining-seconds", "300"]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preemption"]
        subprocess.run([Path(sys.executable).with_name("ray"), "drain-node", *where, *why], check=True)

    def settle(self) -> None:
        """The nodes that belong here, and no others."""
        self.stop_old()
        self.mend()
        while len(self._cluster.worker_nodes) > WORKERS:
            self._cluster.remove_node(next(iter(self._cluster.worker_nodes)))

    def replace(self) -> None:
        """A new cluster, and the end of the old ones."""
        self.start()
        self.stop_old()

    def stop_old(self) -> None:
        """End the clusters that are not used any more."""
        while self._old:
            self._stop(self._old.pop())

    def stop(self) -> None:
        """End all."""
        self.stop_old()
        self._stop(self._cluster)

    def _stop(self, cluster: Any) -> None:
        """Also without a GCS, of which Ray's own way of stopping a cluster asks."""
        from ray._common.utils import reset_ray_address

        for node in cluster.list_all_nodes():
            family = chaos.family(_pid(node))
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            for process in family:
                chaos.shoot(process)
        reset_ray_address()

    def gcs(self) -> int:
        """The process of the cluster's GCS."""
        head: Any = self._cluster.head_node
        return head.all_processes["gcs_server"][0].process.pid


def _running(actor: str, node: "Node") -> list[int]:
    """The node's processes of such actors: Ray has them named after their class."""
    found: list[int] = []
    for process in psutil.Process(_pid(node)).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] * (actor in " ".join(process.cmdline()))
    return found


def _pid(node: "Node") -> int:
    """The node's raylet."""
    return node.all_processes["raylet"][0].process.pid


@dataclass
class Site:
    """What the runs have in common."""

    server: S3Server
    proxy: Any
    bucket: Any
    nodes: Nodes
    bundle: str
    sources: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The labels that the first run of a source has made: all others have to make the same."""

    def stop_server(self) -> None:
        """As a crash would."""
        self.server.__exit__()

    def start_server(self) -> None:
        """With its data, on other ports, which only the proxy sees."""
        self.server.__enter__()
        self.proxy.upstream = self.server.endpoint


@dataclass
class Scenario:
    """One run: kills at one step."""

    step: str
    target: str
    """What is killed or stopped; "none" where something else happens."""
    kills: Callable[[random.Random], list[Any]]
    layout: str = "fused"
    source: str = "flat"
    finish: Callable[[Any], None] = lambda run: None
    """What happens when a driver has ended well."""
    drivers: int = 1


class NodeZombie(chaos.Zombie):
    """A worker that is stopped with its node, while its driver is killed: the run goes on in another cluster."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._site = site

    def kill(self, of: str, key: str, nth: int) -> Any:
        """What is to happen."""
        kill = super().kill(of, key, nth)
        kill.exits, kill.mend, kill.at_end = (-9,), self._move, True
        return kill

    def stop(self, run: Any, pid: int) -> None:
        """The node first, or it would see to the worker."""
        self.suspend(chaos.raylet_of(pid), pid)
        chaos.shoot(run.driver)

    def _move(self, run: Any) -> None:
        self._site.nodes.start()
        run.environment["RAY_ADDRESS"] = self._site.nodes.address


def scenarios(site: Site) -> list[Scenario]:
    """The matrix."""
    return [*_planning(), *_fused_workers(), *_staged(), *_drivers(site), *_machines(site), *_zombies(site)]


def _kills(step: str, method: str, key: str, stages: tuple[str, ...], of: str, most: int, **more: Any) -> Any:
    """Kills of whoever sends such a request, at these stages in turn, each time at one of the first `most`."""
    act = more.pop("act", chaos.shoot_sender)
    more.setdefault("exits", (-9,) if of == "driver" else (0,))

    def drawn(rng: random.Random) -> list[Any]:
        return [chaos.Kill(step, method, key, stage, of, act, rng.randint(1, most), **more) for stage in stages]

    return drawn


def _planning() -> Iterator[Scenario]:
    listed = ("request", "stored", "answered")
    yield Scenario("planning", "driver", _kills("planning", "LIST", "", listed, "driver", 2))
    for source in ("tar", "packed"):
        yield Scenario("planning", "driver", _kills("planning", "GET", "", listed, "driver", 1), source=source)
    for stage in ("request", "half", "stored"):
        step = f"plan PUT, {stage}"
        kills = [_kills(step, "PUT", f"/plan/{of}", (stage,), "driver", 1) for of in ("pages/", "g0000", "g0000")]
        yield Scenario(step, "driver", lambda rng, kills=kills: [k for drawn in kills for k in drawn(rng)])


def _fused_workers() -> Iterator[Scenario]:
    yield Scenario("GET", "worker", _reading("GET"))
    yield Scenario("decode", "worker", _decoding("decode"))
    for step, stage in (("predicted", "request"), ("PUT half sent", "half"), ("PUT stored, unanswered", "stored")):
        kills = _kills(step, "PUT", chaos.PART, (stage,) * KILLS, "worker", 2)
        yield Scenario(step, "worker", kills)
    for source in ("tar", "packed"):
        kills = _kills("PUT", "PUT", chaos.PART, ("request", "half", "stored"), "worker", 1)
        yield Scenario("PUT", "worker", kills, source=source)


def _reading(step: str, **more: Any) -> Any:
    return _kills(step, "GET", "", ("request", "stored", "request"), "worker", 250, **more)


def _decoding(step: str) -> Any:
    def drawn(rng: random.Random) -> list[Any]:
        kills = _kills(step, "GET", "", ("answered",) * KILLS, "worker", 250)(rng)
        for kill in kills:
            kill.delay = rng.uniform(0, 0.1)
        return kills

    return drawn


def _staged() -> Iterator[Scenario]:
    staged = partial(Scenario, layout="staged")
    yield staged("GET", "decode task", _reading("GET"))
    yield staged("decode", "decode task", _decoding("decode"))
    yield staged("predicted", "actor", _reading("predict", act=_shoot_actor))
    for step, stage in (("predicted", "request"), ("PUT half sent", "half")):
        yield staged(step, "driver", _kills(step, "PUT", chaos.PART, (stage,) * KILLS, "driver", 1))
    step = "PUT stored, unanswered"
    for _ in range(KILLS):  # a run has one of them, because units are committed at once: there may not be more
        yield staged(step, "driver", _kills(step, "PUT", chaos.PART, ("stored",), "driver", 1))
    yield staged("before _SUCCESS", "driver", _ending(("request",) * KILLS))
    yield staged("mid-run", "driver", _reading("mid-run", act=chaos.shoot_driver, exits=(-9,)))


def _shoot_actor(run: Any, pid: int) -> None:
    """The actor that predicts, when a decode task reads, which may begin before there is an actor."""
    del run, pid
    until = time.monotonic() + 60
    while not (found := [p for p in psutil.process_iter(["cmdline"]) if "(PredictActor)" in _title(p)]):
        assert time.monotonic() < until, "no actor"
        time.sleep(0.2)
    chaos.shoot(found[0].pid)


def _title(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def _ending(stages: tuple[str, ...]) -> Any:
    return _kills("before _SUCCESS", "PUT", chaos.SUCCESS, stages, "driver", 1)


def _drivers(site: Site) -> Iterator[Scenario]:
    yield Scenario("before _SUCCESS", "driver", _ending(("request",) * KILLS))
    yield Scenario("_SUCCESS half sent, then stored", "driver", _ending(("half", "half", "stored")))
    yield Scenario("mid-run", "driver", _reading("mid-run", act=chaos.shoot_driver, exits=(-9,)))
    stages = ("request", "half", "stored")
    putting = _kills("PUT of a worker", "PUT", chaos.PART, stages, "worker", 1, act=chaos.shoot_driver, exits=(-9,))
    yield Scenario("PUT of a worker", "driver", putting)
    yield Scenario("SIGINT, SIGTERM", "driver", _signals)
    yield Scenario("two drivers", "none", lambda rng: [], drivers=2)
    two = _kills("two drivers", "PUT", chaos.PART, stages, "worker", 1)
    yield Scenario("two drivers", "worker", two, drivers=2)
    for _ in range(2):
        yield Scenario("random", "worker or driver", _anywhere)
    refused = _kills("access refused", "GET", "", ("request",) * KILLS, "worker", 250, act=_refuse)
    del site
    yield Scenario("access refused", "none", lambda rng: [_ended_by_refusal(kill) for kill in refused(rng)])


def _refuse(run: Any, pid: int) -> None:
    del pid
    run.obey(chaos.Rule(403))


def _ended_by_refusal(kill: Any) -> Any:
    kill.exits, kill.at_end, kill.mend = (5,), True, lambda run: run.obey()
    return kill


def _signals(rng: random.Random) -> list[Any]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    kills = _reading("signal", exits=(130,), at_end=True, mend=lambda run: run.obey())(rng)
    for kill, number in zip(kills, numbers, strict=True):
        kill.act = partial(_signal, number=number)
    return kills


def _signal(run: Any, pid: int, number: int) -> None:
    """Reads are slow from here until the driver has ended: its workers would finish everything while it stops."""
    del pid
    run.obey(chaos.Rule("delay", "GET", seconds=2.0))
    os.kill(run.driver, number)


def _anywhere(rng: random.Random) -> list[Any]:
    kills = _reading("random")(rng)
    for kill in kills:
        kill.delay = rng.uniform(0, 0.5)
        if rng.random() < 0.5:
            kill.act, kill.exits = chaos.shoot_driver, (-9,)
    return kills


def _machines(site: Site) -> Iterator[Scenario]:
    def shoot_node(run: Any, pid: int) -> None:
        del run
        for one in chaos.family(chaos.raylet_of(pid)):
            chaos.shoot(one)

    def replace(run: Any) -> None:
        site.nodes.replace()
        run.environment["RAY_ADDRESS"] = site.nodes.address

    def restart(run: Any) -> None:
        del run
        time.sleep(1)
        site.start_server()

    stages = ("request", "half", "stored")
    mended = {"act": shoot_node, "mend": lambda run: site.nodes.mend()}
    for layout in ("fused", "staged"):
        kills = _reading("mid-run", **mended)
        yield Scenario("mid-run", "raylet", kills, layout)
    yield Scenario("PUT", "raylet", _kills("PUT", "PUT", chaos.PART, stages, "worker", 1, **mended))
    gcs = {"act": lambda run, pid: chaos.shoot(site.nodes.gcs()), "mend": replace, "at_end": True, "exits": (1,)}
    yield Scenario("mid-run", "GCS", _reading("mid-run", **gcs))
    stopped = {"act": lambda run, pid: site.stop_server(), "mend": restart, "exits": (0, 5)}
    yield Scenario("PUT", "S3 server", _kills("PUT", "PUT", chaos.PART, stages, "worker", 1, **stopped))
    yield Scenario("nodes join and leave", "none", partial(_come_and_go, site))


def _come_and_go(site: Site, rng: random.Random) -> list[Any]:
    leaving: list[int] = []

    def remember(run: Any, pid: int) -> None:
        del run
        leaving.append(pid)

    kills = _reading("node", act=remember)(rng)
    kills[0].mend = kills[2].mend = lambda run: site.nodes.add()
    kills[1].mend = lambda run: site.nodes.leave(leaving[1])
    return kills


def _zombies(site: Site) -> Iterator[Scenario]:
    for zombie in (chaos.Zombie(), chaos.Zombie(), NodeZombie(site)):
        name = "worker, whose driver dies" if isinstance(zombie, NodeZombie) else "worker"
        kills = partial(_zombie, zombie, "worker", chaos.PART)
        yield Scenario("SIGSTOP", name, kills, finish=zombie.go_on)
    for key, layout in ((r"/plan/g0000", "fused"), (chaos.SUCCESS, "fused"), (chaos.PART, "staged")):
        zombie = chaos.Zombie()
        kills = partial(_zombie, zombie, "driver", key)
        yield Scenario("SIGSTOP", "driver", kills, layout, finish=zombie.go_on)


def _zombie(zombie: Any, of: str, key: str, rng: random.Random) -> list[Any]:
    return [zombie.kill(of, key, rng.randint(1, 2) if key == chaos.PART else 1)]
