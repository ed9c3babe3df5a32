import os
import uuid
from collections.abc import Iterator

import pytest

from raycnn.s3local import S3Server

for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A running S3 server with the bucket `raycnn`, found through the AWS_* variables of this process."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        server.create_bucket("raycnn")
        yield server


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """A prefix that nobody else uses."""
    return f"s3://raycnn/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_cluster(s3: S3Server) -> Iterator[None]:
    """A local cluster of 2 CPUs for the whole session; its workers know the S3 server."""
    import ray

    from raycnn import data

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    data.connect()
    yield
    ray.shutdown()
