"""Starts replicas of an engine on Ray Serve: the arguments that ask for them, and their life."""

import argparse
import contextlib
import logging
import os
import re
import secrets
import socket
from collections.abc import Iterator

from ...common.ray_session import import_serve, ray_session
from .arguments import model_name
from .limits import Limits

START_TRIES = 1  # of a replica's constructor: a model that is not there stays away
HEALTH_SECONDS = 5.0  # between looks at each replica


def add_replica_arguments(parser: argparse.ArgumentParser):
    """Adds how many replicas there are, and where."""
    add = parser.add_argument_group("replicas, on Ray Serve (extra scale)").add_argument
    add(
        "--replicas",
        type=_count,
        default=1,
        metavar="N",
        help="processes that each hold the model (default: 1, in this process, without Ray)",
    )
    add("--max-replicas", type=_count, metavar="N", help="as many under load (default: --replicas)")
    add("--gpus-per-replica", type=_share, metavar="X", help="default: 0, on CPUs")
    add("--cpus-per-replica", type=_share, metavar="X", help="also its threads (default: 1)")
    add("--address", help="of a Ray cluster, as head:6379, or auto (default: this machine)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return float(text)


def wants_ray(args: argparse.Namespace) -> bool:
    """Tells whether replicas are asked for; ValueError for what they alone could follow."""
    if args.replicas > 1 or args.max_replicas is not None or args.address is not None:
        return True
    for name in ("gpus_per_replica", "cpus_per_replica"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"expected --replicas above 1, --max-replicas or --address with"
                f" --{name.replace('_', '-')}"
            )
    return False


@contextlib.contextmanager
def running_relay(args: argparse.Namespace, limits: Limits) -> Iterator:
    """Gives a `Relay` to replicas that are ready, and ends them after its block.

    Raises ValueError for arguments that do not fit, an address at which nobody answers, and
    replicas that have no room or do not start.
    """
    serve = import_serve()
    from .relay import Relay

    _expect_fitting(args)
    cpus = 1.0 if args.cpus_per_replica is None else args.cpus_per_replica
    max_replicas = args.max_replicas or args.replicas
    name = args.name or model_name(args)
    _expect_free(args.host, args.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    # Ray starts workers with low priority, as befits batches; these are to answer people.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with ray_session(args.address, max(2, max_replicas * cpus)) as ray:
        gpus = args.gpus_per_replica or 0.0
        _expect_room(ray, args.replicas, cpus, gpus)
        serve.start(proxy_location="Disabled")  # `Relay` is the door
        application = f"perceptiondlm-{secrets.token_hex(4)}"
        bound = _deployment(serve, args, cpus, gpus).bind(_portable(args), name)
        try:
            handle = _started(serve, bound, application)
            yield Relay(handle, name, limits, max_requests=max_replicas * args.max_queue)
        finally:
            if args.address is not None:  # else they end with Ray itself, sooner
                serve.delete(application)


def _deployment(serve, args: argparse.Namespace, cpus: float, gpus: float):
    from .replica import Replica

    if args.max_replicas is None or args.max_replicas == args.replicas:
        size = {"num_replicas": args.replicas}
    else:  # a full batch is what a replica is meant to be busy with
        bounds = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
        size = {"autoscaling_config": bounds | {"target_ongoing_requests": args.max_batch}}
    return serve.deployment(
        Replica,
        name="replica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=args.max_queue,  # so its own queue never overflows
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=args.grace_seconds,
        max_constructor_retry_count=START_TRIES,
        **size,
    )


def _portable(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the arguments as they mean the same in a replica's process."""
    values = {name: value for name, value in vars(args).items() if name != "run"}
    if args.model is not None and os.path.isdir(args.model):
        values["model"] = os.path.abspath(args.model)
    if values["device"] is None:
        values["device"] = "cuda" if args.gpus_per_replica else "cpu"
    return argparse.Namespace(**values)


def _expect_fitting(args: argparse.Namespace):
    if args.max_replicas is not None and args.max_replicas < args.replicas:
        raise ValueError(
            f"expected --max-replicas of at least --replicas {args.replicas},"
            f" got {args.max_replicas}"
        )
    if args.max_queue < 1:
        raise ValueError(f"expected --max-queue of at least 1, got {args.max_queue}")
    if args.address is not None and args.address.startswith("ray://"):
        raise ValueError(
            "expected the address of a cluster that this machine belongs to, as head:6379 or auto:"
            f" requests pass through no Ray client, got {args.address!r}"
        )

    # Ray shows each replica its own GPUs, numbered from 0.
    device = args.device or ""
    if ":" in device:
        raise ValueError(f"expected --device cpu or cuda for replicas, got {device!r}")
    if (device == "cuda") != bool(args.gpus_per_replica) and device:
        raise ValueError(
            f"expected --gpus-per-replica above 0 with --device cuda alone, got --device {device}"
            f" and {args.gpus_per_replica or 0:g}"
        )


def _expect_free(host: str, port: int):
    """Raises ValueError for a port in use, before replicas are loaded for nothing."""
    try:
        (family, kind, _, _, place), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(place)
    except OSError as error:
        raise ValueError(f"expected to listen on {host}:{port}, got: {error}") from error


def _expect_room(ray, replicas: int, cpus: float, gpus: float):
    resources = ray.cluster_resources()
    for kind, share in (("CPU", cpus), ("GPU", gpus)):
        there = resources.get(kind, 0.0)
        if replicas * share > there:
            raise ValueError(
                f"expected {kind}s for {replicas} replicas of {share:g} each, got {there:g}"
            )


def _started(serve, bound, application: str):
    """Returns the handle of replicas once they are ready; ValueError says why they are not."""
    try:
        return serve.run(bound, name=application, route_prefix=None)
    except RuntimeError as error:
        told = serve.status().applications.get(application)
        texts = [each.message for each in told.deployments.values()] if told else []
        lines = "\n".join(texts).splitlines()
        causes = [line for line in lines if re.match(r"[\w.]*Error\b", line)]
        cause = causes[-1] if causes else error
        raise ValueError(f"the replicas did not start: {cause}") from error
