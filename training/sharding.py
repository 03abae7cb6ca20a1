"""Turns on FSDP2 for CPU processes, and gathers the weights of a sharded model."""

import os

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..common.extras import extra

with extra("train"):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpu(accelerator: Accelerator) -> bool:
    """Turns on the FSDP that `accelerate launch` was asked for, and says whether it did.

    accelerate's state takes an FSDP plugin for accelerators only and falls back to DDP on CPU
    processes, though `fully_shard` runs on gloo as well.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    state = accelerator.state
    if not asked or state.distributed_type != DistributedType.MULTI_CPU:
        return False
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(f"expected fsdp_version 2 on CPU, got {plugin.fsdp_version}")
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    return True


def keep_precise(accelerator: Accelerator):
    """Keeps sharded training in bfloat16 as precise as unsharded.

    The layers' weights are cast, but neither boxes, noise and times nor the loss, and gradients are
    summed in float32.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )


def leave_group():
    """Waits for the other processes of a finished run and leaves them.

    A process that exits within its group may abort, and the launcher then stops the others while
    they still save.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def gather_weights(model: torch.nn.Module, learned_only: bool = False) -> dict[str, torch.Tensor]:
    """Gathers the weights of a sharded model, or those that are trained, on the first process.

    The other processes get nothing; every process calls it.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=learned_only
    )
    return get_model_state_dict(model, options=options)
