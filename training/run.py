"""One run: build, train, save a folder that `from_pretrained` loads."""

import json
import logging
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..common.files import write_bytes
from .build import build_model
from .conversations import ConversationSamples
from .lora import add_adapter
from .parameters import choose_trainable, keep_masters
from .recipe import Recipe, RegionData, SyntheticData
from .regions import RegionSamples
from .sources import FileDataset, StreamDataset
from .synthetic import SceneDataset
from .trainer import DiffusionTrainer

logger = logging.getLogger(__name__)

# over transformers' defaults, under the recipe's own
TRAINER_DEFAULTS = {
    "remove_unused_columns": False,
    "prediction_loss_only": True,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
    "dataloader_drop_last": True,
    "label_names": ["labels"],
}


def train(recipe: Recipe, resume: str | bool | None = None) -> DiffusionTrainer:
    """Runs a recipe and saves the result in its `output_dir`.

    Args:
        resume: a Trainer checkpoint to go on from, or True for the last one.
    """
    args = TrainingArguments(**(TRAINER_DEFAULTS | recipe.trainer))
    if args.n_gpu > 1:
        raise ValueError(
            "expected one GPU, or a launcher such as `accelerate launch` for several, got"
            f" {args.n_gpu} GPUs in one process; CUDA_VISIBLE_DEVICES=0 shows it one of them"
        )
    if args.bf16 and is_emulated(args.device):
        logger.warning(
            "this processor has no bfloat16 arithmetic and emulates it many times slower than"
            " float32: trainer.bf16=false"
        )
    trainer = build_trainer(recipe, args)
    batch, data = args.train_batch_size * args.world_size, trainer.train_dataset
    if not isinstance(data, StreamDataset) and len(data) < batch:
        raise ValueError(
            f"expected samples for a batch, {batch} over all processes, got {len(data)}"
        )
    if resume and is_finished(args, resume):
        logger.warning("nothing is left to train after %s; nothing is saved", resume)
        return trainer
    trainer.train(resume_from_checkpoint=resume)
    save_final(trainer, recipe)
    return trainer


def is_emulated(device: torch.device) -> bool:
    """Whether a device emulates bfloat16, as an x86 processor with AVX2 alone was seen to do."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def is_finished(args: TrainingArguments, resume: str | bool) -> bool:
    """Whether a checkpoint is of the run's last step: the Trainer would go one step further."""
    folder = get_last_checkpoint(args.output_dir) if resume is True else resume
    file = Path(folder or "") / "trainer_state.json"
    if not file.is_file():
        return False  # the Trainer says what is wrong with it
    state = json.loads(file.read_text(encoding="utf-8"))
    if args.max_steps > 0:
        return state["global_step"] >= args.max_steps
    return state["epoch"] >= args.num_train_epochs


def build_trainer(recipe: Recipe, args: TrainingArguments) -> DiffusionTrainer:
    """The model, data and trainer of a recipe."""
    return assemble_trainer(recipe, args, *build_model(recipe))


def assemble_trainer(recipe: Recipe, args: TrainingArguments, model, processor) -> DiffusionTrainer:
    """The data and trainer of a recipe for a model that is already built."""
    if recipe.lora is not None:
        model = add_adapter(model, recipe.lora)
    choose_trainable(model, recipe.parameters)
    if args.bf16 or args.fp16:
        keep_masters(model)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%.2f M of the parameters learn", learning / 1e6)
    datasets = build_datasets(recipe, processor, args)
    return DiffusionTrainer(model, args, recipe, processor, *datasets)


def build_datasets(recipe: Recipe, processor, args: TrainingArguments):
    """Training and evaluation data of a recipe."""
    options = {"seed": args.seed, "permute_prompts": recipe.parameters.permute_prompts}
    if isinstance(recipe.data, SyntheticData):
        train_set = SceneDataset(processor, recipe.data, **options)
        eval_set = None
        if recipe.data.eval_scenes:
            eval_set = SceneDataset(processor, recipe.data, split="heldout", **options)
        return train_set, eval_set
    return file_datasets(recipe, processor, args)


def file_datasets(recipe: Recipe, processor, args: TrainingArguments):
    """Training and evaluation data from files."""
    data = recipe.data
    if isinstance(data, RegionData):
        permute = recipe.parameters.permute_prompts
        maker = RegionSamples(processor, data, seed=args.seed, permute_prompts=permute)
    else:
        maker = ConversationSamples(processor, data)
    options = {"maker": maker, "most_broken": data.max_broken_share, "seed": args.seed}
    if data.streaming:
        place = {"rank": args.process_index, "world_size": args.world_size}
        train_set = StreamDataset(data.files, **options, buffer=data.shuffle_buffer, **place)
    else:
        train_set = FileDataset(data.files, **options)
    return train_set, FileDataset(data.eval_files, **options) if data.eval_files else None


def save_final(trainer: DiffusionTrainer, recipe: Recipe):
    """Weights, config, processor and tokenizer; the code beside them if the recipe says so."""
    folder = Path(trainer.args.output_dir)
    theirs = {path: path.read_bytes() for path in folder.glob("*.py")}
    trainer.save_whole()
    if trainer.args.should_save and not recipe.save_code:
        for module in folder.glob("*.py"):
            if module not in theirs:
                module.unlink()
            elif module.read_bytes() != theirs[module]:
                write_bytes(module, theirs[module])
