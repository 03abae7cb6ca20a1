"""Runs a recipe: builds, trains, saves a folder that `from_pretrained` loads."""

import logging
from pathlib import Path

import torch
from transformers import TrainingArguments

from ..common.files import only_run
from ..common.loading import emulates
from .build import build_model
from .checkpoints import choose_checkpoint, has_final, read_state
from .conversations import ConversationSamples
from .datasets import FileDataset, SampleMaker, StreamDataset
from .distillation import PairedDataset, PairedSamples, Teacher
from .lora import add_adapter
from .param_groups import choose_trainable, keep_masters
from .recipe import Recipe
from .recipe_sections import RegionData, SyntheticData
from .regions import RegionSamples
from .stopping import RunStopped
from .synthetic import SceneDataset
from .trainer import DiffusionTrainer
from .trainer_options import TRAINER_DEFAULTS

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: str | bool | None = None) -> DiffusionTrainer:
    """Runs a recipe and saves the result in its `output_dir`.

    Args:
        resume: a checkpoint to go on from, or True for the newest whole one.

    Raises ValueError where another run writes there, `RunStopped` where the run ends before its
    last step, and KeyboardInterrupt with what there is to go on from.
    """
    expect_evaluation(recipe)
    args = arguments_of(recipe)
    _check_devices(args)
    trainer = build_trainer(recipe, args)
    _expect_whole_batches(trainer)
    with only_run(args.output_dir if args.process_index == 0 else None):
        return _run(trainer, recipe, resume)


def arguments_of(recipe: Recipe) -> TrainingArguments:
    """Returns transformers' arguments of a recipe.

    Where there is no accelerator they say that the CPU is meant: transformers refuses bfloat16
    otherwise.
    """
    options = TRAINER_DEFAULTS | recipe.trainer
    if not torch.accelerator.is_available():
        options.setdefault("use_cpu", True)
    return TrainingArguments(**options)


def _run(trainer: DiffusionTrainer, recipe: Recipe, resume: str | bool | None) -> DiffusionTrainer:
    """Trains, or goes on, and saves the result."""
    args, checkpoint = trainer.args, None
    if resume:
        checkpoint = choose_checkpoint(args.output_dir, resume)
        if is_finished(args, checkpoint) and has_final(args.output_dir, checkpoint):
            logger.warning("nothing is left to train after %s; nothing is saved", checkpoint)
            return trainer

    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.state.global_step < trainer.state.max_steps:  # by trainer.enable_jit_checkpoint
            raise RunStopped(f"stopped before the last step; {trainer.describe_saved()}")
        trainer.save_whole(save_code=recipe.save_code)
    except KeyboardInterrupt:
        step = trainer.state.global_step
        raise KeyboardInterrupt(
            f"interrupted after step {step}; {trainer.describe_saved()}"
        ) from None
    return trainer


def _check_devices(args: TrainingArguments):
    """Refuses several GPUs in one process, and warns of a precision that is only emulated."""
    if args.n_gpu > 1:
        raise ValueError(
            "expected one GPU, or a launcher such as `accelerate launch` for several, got"
            f" {args.n_gpu} GPUs in one process; CUDA_VISIBLE_DEVICES=0 shows it one of them"
        )
    if args.bf16 and emulates(args.device):
        logger.warning(
            "this processor has no bfloat16 arithmetic and emulates it many times slower than"
            " float32: trainer.bf16=false"
        )


def _expect_whole_batches(trainer: DiffusionTrainer):
    """Refuses data that fill no batch; a stream tells its length to nobody."""
    args, data = trainer.args, trainer.train_dataset
    batch = args.train_batch_size * args.world_size
    if not isinstance(data, StreamDataset) and len(data) < batch:
        raise ValueError(
            f"expected samples for a batch, {batch} over all processes, got {len(data)}"
        )


def expect_evaluation(recipe: Recipe):
    """Refuses data for evaluation that no option asks to be evaluated."""
    trainer, data = recipe.trainer, recipe.data
    asked = trainer.get("eval_strategy", "no") != "no" or trainer.get("eval_on_start")
    given = "data.eval_scenes" if isinstance(data, SyntheticData) else "data.eval_files"
    if getattr(data, given.removeprefix("data.")) and not asked:
        raise ValueError(f"expected trainer.eval_strategy with {given}, got none")


def is_finished(args: TrainingArguments, checkpoint: Path) -> bool:
    """Tells whether a checkpoint is of the run's last step."""
    state = read_state(checkpoint)
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["epoch"] >= args.num_train_epochs


def build_trainer(recipe: Recipe, args: TrainingArguments) -> DiffusionTrainer:
    """Builds the model, data and trainer of a recipe."""
    return assemble_trainer(recipe, args, *build_model(recipe, args.device))


def assemble_trainer(recipe: Recipe, args: TrainingArguments, model, processor) -> DiffusionTrainer:
    """Builds the data and trainer of a recipe for a model that is already there."""
    # Choose what learns.
    if recipe.lora is not None:
        model = add_adapter(model, recipe.lora)
    choose_trainable(model, recipe.parameters)
    if args.bf16 or args.fp16:
        keep_masters(model)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%.2f M of the parameters learn", learning / 1e6)

    teacher = None
    if recipe.distillation is not None:
        teacher = Teacher.load(recipe.distillation, processor, args.device)
    datasets = build_datasets(recipe, processor, args, teacher)
    trainer_class = _trainer_class(recipe.data)
    trainer = trainer_class(model, args, recipe, processor, *datasets, teacher=teacher)

    # Whether it is sharded is known only now.
    if recipe.model.quantize is not None and trainer.is_fsdp_enabled:
        raise ValueError(
            "expected no sharding with model.quantize, whose weights it cannot divide, got FSDP"
        )
    if recipe.lora is not None and recipe.lora.merge and trainer.is_fsdp_enabled:
        raise ValueError(
            "expected no sharding with lora.merge, got FSDP: save the adapter, and merge it by"
            " convert_checkpoint.py"
        )

    return trainer


def build_datasets(
    recipe: Recipe, processor, args: TrainingArguments, teacher: Teacher | None = None
):
    """Builds the training and evaluation data of a recipe.

    With a teacher the training data are pairs of the student's and the teacher's samples.
    """
    if not isinstance(recipe.data, SyntheticData):
        return file_datasets(recipe, processor, args, teacher)

    dataset = _scene_dataset(recipe.data)
    options = {"seed": args.seed, "permute_prompts": recipe.parameters.permute_prompts}
    train_set, eval_set = dataset(processor, recipe.data, **options), None
    if teacher is not None:
        train_set = PairedDataset(train_set, dataset(teacher.processor, recipe.data, **options))
    if recipe.data.eval_scenes:
        eval_set = dataset(processor, recipe.data, split="heldout", **options)
    return train_set, eval_set


def _scene_dataset(data: SyntheticData) -> type[SceneDataset]:
    """Returns the kind of data set that a recipe's scenes need."""
    if data.scene_kind == "shapes":
        return SceneDataset
    if data.objective == "names":
        from .naming import NameDataset  # needs what draws things

        return NameDataset
    from .synthetic_things import ThingDataset  # needs what draws things

    return ThingDataset


def _trainer_class(data) -> type[DiffusionTrainer]:
    """Returns the trainer of what a recipe's data are to teach."""
    if isinstance(data, SyntheticData) and data.objective == "names":
        from .naming import NameTrainer  # needs what draws things

        return NameTrainer
    return DiffusionTrainer


def file_datasets(
    recipe: Recipe, processor, args: TrainingArguments, teacher: Teacher | None = None
):
    """Builds training and evaluation data from files, as `build_datasets`."""
    data = recipe.data
    maker = paired = _sample_maker(recipe, processor, args)
    if teacher is not None:
        paired = PairedSamples(maker, _sample_maker(recipe, teacher.processor, args))

    options = {"max_broken_share": data.max_broken_share, "seed": args.seed}
    if data.streaming:
        place = {"rank": args.process_index, "world_size": args.world_size}
        train_set = StreamDataset(
            data.files, paired, **options, buffer=data.shuffle_buffer, **place
        )
    else:
        train_set = FileDataset(data.files, paired, **options)
    return train_set, FileDataset(data.eval_files, maker, **options) if data.eval_files else None


def _sample_maker(recipe: Recipe, processor, args: TrainingArguments) -> SampleMaker:
    """Returns what makes samples of the recipe's kind of records."""
    if isinstance(recipe.data, RegionData):
        permute = recipe.parameters.permute_prompts
        return RegionSamples(processor, recipe.data, seed=args.seed, permute_prompts=permute)
    return ConversationSamples(processor, recipe.data)
