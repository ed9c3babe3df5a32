"""Ray Train as this project runs it: a user's mistake ends a run at once, and Ctrl-C is left alone."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError

from raycnn import data
from raycnn.config import TrainConfig
from raycnn.errors import RaycnnError, StorageError, unwrap
from raycnn.storage import scratch_folder

ABORT_S = 5.0
"""How long Ctrl-C waits for the workers to be stopped in good order."""
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""To glibc, where CPUs train: keep freed memory for the next step, which needs as much.

Otherwise each step gives the system back its activations, and waits while it clears new pages for them. One arena,
because those of threads other than the main one always give back what is free.
"""
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


class _Trainer(TorchTrainer):
    controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        policy = Policy(self.run_config.failure_config or FailureConfig())
        return super()._initialize_and_run_controller(**arguments | {"failure_policy": policy})

    def _create_default_callbacks(self) -> list[Any]:
        """Without two actors, each of which takes seconds to start.

        One splits datasets among workers: ours read the data by themselves, in our own order. The other frees what a
        dead controller has reserved: ours does not outlive the driver, with whose end Ray frees it.
        """
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, left_out)]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray Train's handler ends the process with its own exit code, and stays in place."""
        self.controller = controller


def launch(
    work: Callable[[dict[str, Any]], None], arguments: dict[str, Any], config: TrainConfig, plan: data.TrainPlan
) -> None:
    """Run `work(arguments)` on every training worker, to its end."""
    workers = (config.min_workers, config.num_workers) if config.min_workers else config.num_workers
    per_worker = {"CPU": plan.worker_cpus} | ({"GPU": plan.worker_gpus} if plan.worker_gpus else {})
    with scratch_folder() as scratch:
        trainer = _Trainer(
            work,
            train_loop_config=arguments,
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
                worker_runtime_env={} if plan.worker_gpus else {"env_vars": KEEP_MEMORY},
            ),
        )
        try:
            trainer.fit()
        except KeyboardInterrupt:
            if trainer.controller is not None:
                # A controller that is still starting does not answer for long; it dies with this process anyway.
                with suppress(RayActorError, GetTimeoutError):
                    ray.get(trainer.controller.abort.remote(), timeout=ABORT_S)
            raise
