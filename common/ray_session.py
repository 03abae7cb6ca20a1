"""Starts Ray on this machine, or joins a cluster, for as long as a run lasts."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from .extras import extra

SECONDS_TO_CONNECT = 10
# What an actor of the pool asks for where none has a GPU; reading and writing need the rest.
ACTOR_CPUS = 0.5


def import_ray():
    """Imports Ray; MissingExtra names the extra that brings it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    with extra("scale"):
        import ray
    return ray


def import_data():
    """Imports Ray with Ray Data; MissingExtra names the extra that brings them."""
    ray = import_ray()
    with extra("scale"):
        import pyarrow.parquet  # noqa: F401
        import ray.data
    return ray


def import_serve():
    """Imports Ray Serve; MissingExtra names the extra that brings it."""
    import_ray()
    with extra("scale"):
        from ray import serve
    return serve


@contextmanager
def ray_session(address: str | None = None, min_cpus: float = 2) -> Iterator:
    """Gives Ray, embedded in this process, or joined at an address; a session that is there stays.

    Args:
        address: of a cluster; None: embedded.
        min_cpus: that an embedded Ray counts, however few the machine has.

    Raises ValueError for an address at which nobody answers, and for another than that of the
    session that is there.
    """
    ray = import_ray()
    if ray.is_initialized():
        if address is not None:
            _expect_joined(address, ray.get_runtime_context().gcs_address)
        yield ray
        return

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # Reading, opening and writing need a share beside the actors.
        cpus = max(
            min_cpus, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
        )
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    else:
        _expect_listener(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unreachable(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _expect_joined(address: str, joined: str):
    """Refuses an address other than that of the cluster that this process has joined."""
    if address in ("auto", joined):
        return
    _expect_listener(address)
    host, port = _host_and_port(address)
    own_host, own_port = _host_and_port(joined)
    # A client's port is another than the cluster's own.
    same_port = port == own_port or address.startswith("ray://")
    if not same_port or not _addresses(host) & _addresses(own_host):
        raise ValueError(
            f"expected {joined}, the Ray cluster that this process has joined, got {address!r}"
        )


def _addresses(host: str) -> set[str]:
    """Returns the IP addresses of a host, or its name alone where that cannot be looked up."""
    try:
        return {str(found[-1][0]) for found in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        return {host}


def _expect_listener(address: str):
    """Asks for a connection beforehand: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _host_and_port(address: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:ray://)?([^:/\s]+|\[[0-9a-fA-F:]+\]):(\d{1,5})/?", address)
    if found is None:
        raise ValueError(
            f"expected an address as HOST:PORT, ray://HOST:PORT or auto, got {address!r}"
        )
    return found[1].strip("[]"), int(found[2])


def _unreachable(address: str, error: Exception) -> ValueError:
    return ValueError(f"expected a Ray cluster at {address}, got no answer: {error}")


def pool_size(ray, actors: int | None, gpus_per_actor: float) -> tuple[int, float]:
    """Returns how many actors a pool has, and the CPUs that each of them asks for.

    Args:
        actors: as many; None: as the cluster has room for.
        gpus_per_actor: 0 for actors on CPUs.

    Raises ValueError for more than there is room for.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if gpus_per_actor:
        room = int(gpus / gpus_per_actor + 1e-9)
        if room < (actors or 1):
            raise ValueError(
                f"expected GPUs for {actors or 1} actors of {gpus_per_actor:g} each, got {gpus:g}"
            )
    count = actors or (room if gpus_per_actor else max(1, int(cpus)))
    return count, min(ACTOR_CPUS, max(cpus - 1, 0.5) / count)
