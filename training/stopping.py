"""Ends a run before its last step, in all its processes for the same reason."""

import re

import torch

# how torch's loader hands on what a worker raised: with the worker's traceback in the message
WORKER_ERROR = re.compile(r"\ACaught \w+ in [^\n]*\.\nOriginal Traceback.*\n[\w.]+: (.+)\Z", re.S)


class RunStopped(ValueError):
    """A run that ended before its last step, why, and what it leaves to go on from."""


def plain_message(error: BaseException) -> str:
    """Returns the message of an error, without the traceback of the loader's worker around it."""
    text = str(error) or type(error).__name__
    found = WORKER_ERROR.match(text)
    return found[1].strip() if found else text


def is_distributed() -> bool:
    """Tells whether several processes run together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def any_process(flag: bool, device: torch.device) -> bool:
    """Tells whether `flag` is set in any process of the run; every process calls it."""
    if not is_distributed():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)
