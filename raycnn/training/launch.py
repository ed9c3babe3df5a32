"""Ray Train as this project runs it: a user's mistake ends a run at once, and Ctrl-C is left alone."""

import asyncio
from collections import defaultdict
from contextlib import suppress
from datetime import timedelta
from typing import Any

import ray
from ray._common.network_utils import build_address  # pyright: ignore[reportAttributeAccessIssue]
from ray.train import FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from raycnn import data
from raycnn.config import TrainConfig
from raycnn.errors import RaycnnError, StorageError, unwrap
from raycnn.storage import scratch_folder

GROUP_TIMEOUT_S = 1800.0
"""How long workers wait for one of them, whose images or checkpoint may be slow to come; NCCL's own limit is 600."""
RESIZE_S = 60.0
"""Between two looks whether there is room for more workers, which begin at the last checkpoint."""


class Policy(DefaultFailurePolicy):
    """Replaces workers that died, up to `max_failures`; what a user has to mend would only fail again."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """RAISE what a user has to mend; for all else what Ray Train decides."""
        cause = unwrap(training_failed_error)
        if isinstance(cause, RaycnnError) and not isinstance(cause, StorageError):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _ProcessGroup(Backend):
    """As Ray Train's backend for torch, which is not needed here: to import it takes seconds.

    It takes no group apart: to the thread that trains, a worker without one is alone, and what it has seen is all.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Bring the workers together, each in its own process group of torch."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        ray.get(worker_group.execute_async(_join, build_address(address, port)))


class _Torch(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup


def _join(address: str) -> None:
    import ray.train
    from ray.train.torch import get_device
    from torch import distributed

    context = ray.train.get_context()
    distributed.init_process_group(
        "nccl" if get_device().type == "cuda" else "gloo",
        init_method=f"tcp://{address}",
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )


class _WorkerGroup(WorkerGroup):
    """Workers whose controller is no actor that they could ask for checkpoints: they never do."""

    _reserved: Any = None

    def _create_placement_group(self, *arguments: Any, **named: Any) -> Any:
        self._reserved = super()._create_placement_group(*arguments, **named)
        return self._reserved

    def _start(self) -> None:
        """As it is; but Ctrl-C, too, gives back what is reserved, for which the process may go on and train again."""
        try:
            super()._start()
        except KeyboardInterrupt:
            if self._reserved is not None:
                self._reserved.shutdown()
            raise

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        begun = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[i] for name, values in train_context_args.items()},
            )
            for i, worker in enumerate(workers)
        ]
        ray.get(begun)
        self._decorate_worker_log_file_paths(workers)


class _Notices(PreemptionCallback):
    """Notices of preemption, watched for in this process: another actor would take seconds to start."""

    _watcher: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes of these workers, and tell each of them which are about to be taken away."""
        self._stop_watcher()
        ranks, workers = defaultdict[str, list[int]](list), dict[int, Any]()
        for worker in worker_group.get_workers():
            rank = worker.distributed_context.world_rank
            ranks[worker.metadata.node_id].append(rank)
            workers[rank] = worker.actor
        self._watcher = PreemptionWatcher(dict(ranks), self._poll_interval_s, workers)

    def _stop_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher._stop_event.set()
            self._watcher = None


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup

    def __init__(self, **arguments: Any) -> None:
        """With our own watch for notices of preemption."""
        super().__init__(**arguments)
        self.notices, found = _Notices(), self._worker_group_callbacks_to_propagate
        found[:] = [self.notices if isinstance(one, PreemptionCallback) else one for one in found]


class _Trainer(DataParallelTrainer):
    """Ray Train's, whose controller runs here: an actor of its own would take seconds to start."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        policy = Policy(self.run_config.failure_config or FailureConfig())
        controller = _Controller(**arguments | {"failure_policy": policy})
        _complete(controller)
        return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        """Without two actors, each of which takes seconds to start, and without the state of runs that are actors.

        One splits datasets among workers: ours read the data by themselves, in our own order. The other frees what a
        dead controller has reserved: ours does not outlive the driver, with whose end Ray frees it.
        """
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback, StateManagerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, left_out)]


def _complete(controller: _Controller) -> None:
    """Run it to its end, also where a notebook's event loop calls; Ctrl-C stops the workers in good order.

    `asyncio.run` would keep Ctrl-C from Ray's calls, which wait for long.
    """
    outer, loop = asyncio.events._get_running_loop(), asyncio.new_event_loop()
    asyncio.events._set_running_loop(None)
    try:
        loop.run_until_complete(controller.run())
    except KeyboardInterrupt:
        with suppress(Exception):  # the cluster may be what is going away
            controller._controller_callback_manager.invoke_best_effort("before_controller_abort")
            if (group := controller.get_worker_group()) is not None and group.has_started():
                group.abort()
        raise
    finally:
        controller.notices._stop_watcher()
        loop.close()
        asyncio.events._set_running_loop(outer)


def launch(arguments: dict[str, Any], config: TrainConfig, plan: data.TrainPlan) -> None:
    """Run `raycnn.training.rank.work(arguments)` on every training worker, to its end."""
    workers = (config.min_workers, config.num_workers) if config.min_workers else config.num_workers
    per_worker = {"CPU": plan.worker_cpus} | ({"GPU": plan.worker_gpus} if plan.worker_gpus else {})
    with scratch_folder() as scratch:
        trainer = _Trainer(
            _work,
            train_loop_config=arguments,
            backend_config=_Torch(),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=plan.worker_gpus > 0,
                resources_per_worker=per_worker,
                elastic_resize_monitor_interval_s=RESIZE_S,
            ),
            # Our checkpoints lie in the run folder; Ray Train's own state is of no use to a later process.
            run_config=RunConfig(
                storage_path=str(scratch),
                name="run",
                failure_config=FailureConfig(max_failures=config.max_failures),
                worker_runtime_env={"env_vars": plan.environment},
                logging_config=LoggingConfig("CRITICAL"),  # here; what fails is raised, and Ray's own files have it all
            ),
        )
        trainer.fit()


def _work(arguments: dict[str, Any]) -> None:
    from raycnn.training.rank import work

    work(arguments)
