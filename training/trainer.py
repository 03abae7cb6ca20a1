"""Extends transformers' Trainer by the diffusion loss, an order of samples and parameter groups."""

import functools
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from ..common.fingerprints import stored_tensors
from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from .checkpoints import (
    STATE,
    checkpoint_folders,
    move_checkpoint,
    move_final,
    saving_folder,
    wait_for_others,
)
from .distillation import PairedCollator, Teacher, distillation_loss
from .muon import WithMuon, takes_muon
from .param_groups import parameter_groups
from .recipe import Recipe
from .sampler import EpochSampler
from .samples import DiffusionCollator
from .sharding import gather_weights, keep_precise, shard_on_cpu
from .stopping import RunStopped, any_process, is_distributed, plain_message

GROUPED = "group_by_length"


@contextmanager
def _named(folder, part: str):
    """Says which part of which checkpoint could not be read, whatever the error."""
    try:
        yield
    except Exception as error:  # files hold anything, and their readers raise anything
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"expected the {part} of this run in {folder}, got: {message}") from error


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the part of a sharded parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class EvaluationLevel(Dataset):
    """A data set to be evaluated at one noise level; its own type tells the collator."""

    def __init__(self, dataset: Dataset, level: float):
        self.dataset = dataset
        self.level = level

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index]


def evaluation_sets(dataset: Dataset | None, levels: list[float]) -> dict | None:
    """Returns a data set at each noise level, named by t in per cent ("t25")."""
    if dataset is None or not len(dataset):
        return None
    return {f"t{round(100 * level)}": EvaluationLevel(dataset, level) for level in levels}


class DiffusionTrainer(Trainer):
    """Trains a `PerceptionDLMForConditionalGeneration`, or an adapter of one.

    Args:
        recipe: masking and parameters; `args` are already made from its trainer section.
        processor: saved beside every checkpoint.
        train_dataset: gives `Sample`s by index, and their `length(index)`.
        eval_dataset: the same, evaluated at the recipe's noise levels.
        teacher: whose predictions are learned as the recipe says; `train_dataset` then gives pairs
            of samples, `eval_dataset` single ones still.
    """

    def __init__(
        self,
        model,
        args: TrainingArguments,
        recipe: Recipe,
        processor,
        train_dataset,
        eval_dataset=None,
        callbacks=None,
        teacher: Teacher | None = None,
    ):
        self.recipe = recipe
        self.teacher = teacher
        self.loss_weighting = recipe.masking.loss_weighting
        self.processor = processor
        self.sampler = None
        self._saving = None  # the folder that a checkpoint is being written to

        # A teacher of another layout gets each sample's inputs in its own form.
        self._collator = functools.partial(
            DiffusionCollator,
            masking=recipe.masking,
            seed=args.seed,
            pad_to_multiple_of=recipe.data.pad_to_multiple_of,
        )
        collator = self._collator(processor)
        if teacher is not None:
            collator = PairedCollator(collator, self._collator(teacher.processor))

        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=evaluation_sets(eval_dataset, recipe.masking.eval_levels),
            processing_class=processor,
            callbacks=callbacks,
        )

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = shard_on_cpu(self.accelerator) or self.is_fsdp_enabled
        if self.is_fsdp_enabled:
            keep_precise(self.accelerator)

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        grouped = args.train_sampling_strategy == GROUPED
        dataset = train_dataset or self.train_dataset
        self.sampler = EpochSampler(dataset, args.seed, batch, grouped)
        return self.sampler

    def _run_epoch(self, *args, epoch: int, **kwargs):
        # when a run of several processes goes on within an epoch, the skipping loader hides the
        # sampler from the Trainer's own notice of the epoch
        if self.state.global_step >= self.state.max_steps:  # a finished run, whose result is saved
            self.control.should_training_stop = True
            return None
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_train_dataloader(self):
        """Builds the loader; a stream has divided its records among the processes itself."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            drop_last=True,
            **self._loader_options(),
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """Builds the loader of all of a set, in order, at its noise level."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]

        loader = DataLoader(
            eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self._collator(self.processor, level=eval_dataset.level),
            **self._loader_options(),
        )
        return self.accelerator.prepare(loader)

    def _loader_options(self) -> dict:
        """Returns the trainer's options of a loader's workers."""
        names = ("num_workers", "pin_memory", "prefetch_factor", "multiprocessing_context")
        options = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        return options | {"in_order": self.args.dataloader_in_order}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Evaluates as the Trainer, and logs the mean loss over all noise levels too.

        By that mean checkpoints are compared. Draws are the same at every call.
        """
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        except Exception as error:
            if self.is_in_train and not isinstance(error, RunStopped) and not is_distributed():
                self._save_and_stop(error)
            raise
        if eval_dataset is None:
            losses = [metrics[f"{metric_key_prefix}_{name}_loss"] for name in self.eval_dataset]
            mean = {f"{metric_key_prefix}_loss": sum(losses) / len(losses)}
            self.log(mean)
            metrics |= mean
        return metrics

    def get_batch_samples(self, *args, **kwargs):
        """Fetches batches as the Trainer.

        Where data ends the run, say by too many broken records, what has been learned is saved
        first, and every process raises `RunStopped`.
        """
        problem = batches = None
        try:
            batches = super().get_batch_samples(*args, **kwargs)
        except Exception as error:
            problem = error
        if any_process(problem is not None, self.args.device):
            self._save_and_stop(problem)
        return batches

    def _save_and_stop(self, problem: Exception | None):
        """Saves what has been learned, then raises `RunStopped`."""
        self.save_now()
        why = "another process has stopped" if problem is None else plain_message(problem)
        raise RunStopped(f"{why}; {self.describe_saved()}") from problem

    def training_step(self, *args, **kwargs):
        """Takes a step as the Trainer; raises `RunStopped` for a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        self._expect_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16:  # whose scaler leaves such a step out, and goes on
            self._expect_finite("gradient", torch.as_tensor(norm))
        return norm

    def _expect_finite(self, name: str, value: torch.Tensor):
        """Stops before the optimizer's step, so that the last checkpoint holds what was learned."""
        if any_process(not bool(torch.isfinite(value).all()), self.args.device):
            raise RunStopped(
                f"expected a finite {name}, got {float(value)} after step"
                f" {self.state.global_step}: try a lower trainer.learning_rate;"
                f" {self.describe_saved()}"
            )

    def expect_finite_weights(self):
        """Refuses to save weights that are not finite."""
        stored = (t for p in self.model.parameters() for t in stored_tensors(_local(p)))
        finite = (bool(torch.isfinite(tensor).all()) for tensor in stored)
        if any_process(not all(finite), self.args.device):
            raise RunStopped(
                f"expected finite weights, got others after step {self.state.global_step}: try a"
                f" lower trainer.learning_rate; {self.describe_saved()}"
            )

    def describe_saved(self) -> str:
        """Says what there is to go on from."""
        folders = checkpoint_folders(self.args.output_dir)
        if not folders:
            return "no checkpoint was saved"
        return f"the last checkpoint is {folders[0]}, from which --resume goes on"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weights the loss as the recipe says in training, not at all at a fixed noise level."""
        weighting = self.loss_weighting if model.training else "none"
        if "teacher" in inputs:
            recipe = self.recipe.distillation
            return distillation_loss(model, self.teacher, inputs, recipe, weighting)
        outputs = model(**inputs, loss_weighting=weighting)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _save_checkpoint(self, model, trial):
        """Saves as the Trainer, whole or not at all, and finite weights only."""
        self.expect_finite_weights()
        step, args = self.state.global_step, self.args
        name = f"checkpoint-{step}"
        target = Path(args.output_dir) / name

        with saving_folder(args.output_dir, is_main=args.process_index == 0) as self._saving:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                folder, self._saving = self._saving / name, None
            wait_for_others()  # whose random states belong to it
            if args.process_index == 0:
                if self.state.best_global_step == step:
                    self.state.best_model_checkpoint = str(target)
                    self.state.save_to_json(str(folder / STATE))
                move_checkpoint(folder, target)
            wait_for_others()
            if args.local_process_index == 0 and folder.exists():  # on a disk of its own
                move_checkpoint(folder, target)
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(target)
        if args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(args.output_dir, args.save_total_limit, best, use_mtime=True)

    def _get_output_dir(self, trial):
        return str(self._saving or super()._get_output_dir(trial))

    def save_now(self):
        """Saves a checkpoint of the present step, unless there is one, or nothing to save."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step and not folder.is_dir():
            self._save_checkpoint(self.model, trial=None)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _named(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _named(checkpoint, "optimizer and scheduler"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with _named(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def save_model(self, output_dir=None, _internal_call=False):
        """Saves as the Trainer; called by every process of a run.

        A sharded checkpoint too holds the config, the processor and, of a LoRA run, the adapter in
        one piece.
        """
        super().save_model(output_dir, _internal_call)
        if not self.is_fsdp_enabled:
            return
        folder = output_dir or self.args.output_dir
        if isinstance(self.model, PreTrainedModel):
            if self.args.should_save:
                self.model.config.save_pretrained(folder)
                self.processor.save_pretrained(folder)
        else:
            self._save_gathered(folder)

    def save_whole(self, save_code: bool = True):
        """Saves the result in `output_dir`, all of it or none; called by every process of a run.

        That is the weights in one piece, config, processor and, unless told not to, code.
        """
        self.expect_finite_weights()
        is_main = self.args.process_index == 0
        with saving_folder(self.args.output_dir, is_main=is_main) as folder:
            if self.is_fsdp_enabled:
                self._save_gathered(str(folder))
            elif self.recipe.lora is not None and self.recipe.lora.merge:
                self._save_merged(str(folder))
            else:
                self.save_model(str(folder))
            if is_main:
                for module in [] if save_code else folder.glob("*.py"):
                    module.unlink()
                move_final(folder, Path(self.args.output_dir))
            wait_for_others()

    def _save_merged(self, folder: str):
        """Adds the adapter to the model's weights and saves them; nothing is learned after."""
        merged = self.accelerator.unwrap_model(self.model).merge_and_unload()
        if self.args.should_save:
            merged.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def _save_gathered(self, folder: str):
        """Saves the weights of a sharded model in one piece, or its adapter."""
        model = self.model
        is_whole = isinstance(model, PreTrainedModel)  # else an adapter
        weights = gather_weights(model, learned_only=not is_whole)
        if not self.args.should_save:
            return

        if is_whole:
            # sharding has changed the model's class, from which the code to save is found
            with torch.device("meta"):
                model = PerceptionDLMForConditionalGeneration(model.config)

        model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)

    def create_optimizer(self, model=None):
        """Builds the optimizer as the Trainer, with the recipe's groups.

        Each module that has its own learning rate is a group; the matrices that the recipe gives
        to Muon are updated by it.
        """
        model = self.model if model is None else model
        if self.optimizer is not None:
            return self.optimizer
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)

        recipe = self.recipe.parameters
        decayed = set(self.get_decay_parameter_names(model))
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = {n: p for n, p in learned.items() if takes_muon(n, p, recipe.muon)}
        others = {n: p for n, p in learned.items() if n not in matrices}

        def groups(parameters: dict) -> list[dict]:
            rates, decay = recipe.learning_rates, self.args.weight_decay
            return parameter_groups(parameters, decayed, rates, decay)

        try:
            self.optimizer = cls(groups(others), **options)
        except TypeError as error:
            raise ValueError(f"expected trainer.optim_args of {cls.__name__}, {error}") from error
        if matrices:
            if self.is_fsdp_enabled:
                raise ValueError("expected no parameters.muon in sharded training, got some")
            muon_groups = [{"lr": self.args.learning_rate, **group} for group in groups(matrices)]
            self.optimizer = WithMuon(muon_groups, self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Builds the scheduler as the Trainer; ValueError for options that it does not take."""
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            kind = self.args.lr_scheduler_type.value
            raise ValueError(f"expected trainer.lr_scheduler_kwargs of {kind}, {error}") from error
