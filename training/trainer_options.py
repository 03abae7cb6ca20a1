"""Says which of `transformers.TrainingArguments` a recipe may set, and why not the others.

Every field is in one of three tables. An option without effect here, or with a wrong one, is
refused: it would be a setting that somebody relies on.
"""

import dataclasses
import importlib.util
import typing

from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..common.option_checks import expect_known, expect_type, field_names

HONORED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step
    log_on_each_node include_num_input_tokens_seen log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    full_determinism seed use_cpu accelerator_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
    ddp_timeout fsdp fsdp_config skip_memory_metrics
    """.split()
)

# set by the command, and what another value would break
NEUTRAL = {
    "remove_unused_columns": (False, "a sample is no table's row"),
    "prediction_loss_only": (True, "an evaluation computes losses alone"),
    "label_names": (["labels"], "that is what the model takes"),
    "logging_nan_inf_filter": (False, "a loss that is not finite stops the run"),
    "do_train": (True, "the command trains"),
}

_HUB = "the result is published by `perceptiondlm publish`"
_METRICS = "an evaluation computes losses alone"
REFUSED = {
    "average_tokens_across_devices": "a sample's loss is weighted by its own tokens",
    "label_smoothing_factor": "the diffusion loss takes masked tokens as they are",
    "optim_target_modules": "its optimizers choose parameters themselves; see parameters.muon",
    "bf16_full_eval": "an evaluation during training runs in the training's precision",
    "fp16_full_eval": "an evaluation during training runs in the training's precision",
    "use_liger_kernel": "there are no Liger kernels for this model",
    "liger_kernel_config": "there are no Liger kernels for this model",
    "use_cache": "training caches nothing",
    "auto_find_batch_size": "the order of samples depends on the batch size",
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "eval_accumulation_steps": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "restore_callback_states_from_checkpoint": "no callback of a run has a state",
    "data_seed": "samples are drawn by trainer.seed",
    "parallelism_config": "runs are sharded by FSDP alone",
    "deepspeed": "runs are sharded by FSDP alone",
    "length_column_name": "samples know their lengths",
    "debug": "masked attention holds the infinities that it looks for",
    "do_eval": "trainer.eval_strategy says when to evaluate",
    "do_predict": "the command trains; see `perceptiondlm evaluate predict`",
    "resume_from_checkpoint": "`--resume` says it",
    "local_rank": "the launcher says it",
}

# over transformers' defaults, under the recipe's own
TRAINER_DEFAULTS = {
    **{name: value for name, (value, _) in NEUTRAL.items()},
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
    "dataloader_drop_last": True,
}

SAMPLING = ("group_by_length", "random")
ACCELERATOR_KEYS = ("gradient_accumulation_kwargs", "non_blocking")
# optimizers that are made of the model, not of groups of its parameters
OTHER_OPTIMIZERS = ("galore", "apollo", "lomo")
NOT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor")
PLATEAU = ("reduce_lr_on_plateau", "greedy")
CHECKPOINTING = {"activation_checkpointing": "gradient_checkpointing"}  # new name: old name
PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}  # of another name than the integration


def check_trainer(values: dict) -> dict:
    """Checks the trainer section: names, types, and that every option has its effect."""
    values = _with_present_names(values)
    expect_known("trainer", values, field_names(TrainingArguments))
    if "output_dir" not in values:
        raise ValueError("expected trainer.output_dir, got none")

    hints = typing.get_type_hints(TrainingArguments)
    for name, value in values.items():
        _check_use(name, value)
        expect_type(f"trainer.{name}", value, hints[name])
    _check_combinations(values)
    _check_reports(values.get("report_to"))
    return values


def _with_present_names(values: dict) -> dict:
    """Renames checkpointing options to what the installed transformers calls them.

    Another name than the present one is deprecated, or not there yet.
    """
    known = field_names(TrainingArguments)
    renamed = {}
    for new, old in CHECKPOINTING.items():
        present, other = (new, old) if new in known else (old, new)
        renamed |= {other: present, f"{other}_kwargs": f"{present}_kwargs"}
    for name in renamed:
        if name in values and renamed[name] in values:
            raise ValueError(f"expected trainer.{name} or trainer.{renamed[name]}, got both")
    return {renamed.get(name, name): value for name, value in values.items()}


def _check_use(name: str, value):
    """Refuses an option that would be ignored, or break what the command relies on."""
    if name in NEUTRAL and value != NEUTRAL[name][0]:
        expected, reason = NEUTRAL[name]
        raise ValueError(f"expected trainer.{name} as {expected}, since {reason}; got {value!r}")
    if name in REFUSED and value != _default_of(name):
        raise ValueError(f"expected no trainer.{name}, since {REFUSED[name]}; got {value!r}")


def _default_of(name: str):
    """Returns transformers' default of an option."""
    (field,) = (f for f in dataclasses.fields(TrainingArguments) if f.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_combinations(values: dict):
    """Refuses options that others leave without effect."""
    optim = str(values.get("optim", ""))
    if any(name in optim for name in OTHER_OPTIMIZERS):
        raise ValueError(
            "expected trainer.optim that takes groups of parameters, since learning rates and decay"
            f" are per group, got {optim!r}"
        )
    sampling = values.get("train_sampling_strategy", SAMPLING[0])
    if sampling not in SAMPLING:
        raise ValueError(
            f"expected trainer.train_sampling_strategy among {', '.join(SAMPLING)},"
            f" got {sampling!r}"
        )
    accelerator = values.get("accelerator_config") or {}
    if isinstance(accelerator, dict):
        expect_known("trainer.accelerator_config", accelerator, ACCELERATOR_KEYS)

    for name, used in _uses(values, optim).items():
        # An empty mapping is how an override takes a recipe's own `lr_scheduler_kwargs` away.
        says_nothing = name not in values or values[name] in (_default_of(name), {})
        if not used and not says_nothing:
            raise ValueError(
                f"expected no trainer.{name}, which has no effect with the other options, got"
                f" {values[name]!r}"
            )


def _uses(values: dict, optim: str) -> dict[str, bool]:
    """Tells, for each option that depends on others, whether they let it have its effect.

    A strategy of "no" is a switch, beside which the steps may stay.
    """

    saves, logs = values.get("save_strategy", "steps"), values.get("logging_strategy", "steps")
    evaluates = values.get("eval_strategy")  # not given is not switched off
    scheduler = values.get("lr_scheduler_type", "linear")
    ranks = values.get("load_best_model_at_end") or saves == "best" or scheduler in PLATEAU
    is_adam = not any(name in optim for name in NOT_ADAM)

    return {
        "eval_steps": evaluates in ("steps", "no"),
        "eval_delay": evaluates is not None,
        "save_steps": saves in ("steps", "no"),
        "logging_steps": logs in ("steps", "no") or evaluates == "steps",
        "metric_for_best_model": ranks,
        "greater_is_better": ranks,
        "warmup_steps": scheduler not in ("constant", *PLATEAU),
        "lr_scheduler_kwargs": scheduler not in ("constant", "constant_with_warmup"),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), is_adam),
        **{f"{name}_kwargs": values.get(name) for pair in CHECKPOINTING.items() for name in pair},
    }


def _check_reports(report_to):
    """Refuses a place to report to whose package is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    names = [name for name in names if name not in ("none", "all")]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", "all", *sorted(INTEGRATION_TO_CALLBACK)])
            raise ValueError(f"expected trainer.report_to among {known}, got {name!r}")
        found = name in get_available_reporting_integrations()
        if not found and importlib.util.find_spec(PACKAGES.get(name, name)) is None:
            raise ValueError(
                f"expected the package of {name} for trainer.report_to, found none: install it, or"
                " set trainer.report_to=none"
            )
