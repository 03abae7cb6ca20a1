"""transformers' Trainer with the diffusion loss, this package's sample order and its groups."""

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from .muon import WithMuon, takes_muon
from .order import EpochSampler
from .parameters import parameter_groups
from .recipe import Recipe
from .samples import DiffusionCollator
from .sharding import gather_weights, keep_precise, shard_on_cpu

GROUPED = "group_by_length"


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
    """A data set at each noise level, named by t in per cent ("t25")."""
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
    ):
        self.recipe = recipe
        self.loss_weighting = recipe.masking.loss_weighting
        self.processor = processor
        self.sampler = None
        super().__init__(
            model=model,
            args=args,
            data_collator=DiffusionCollator(processor, recipe.masking, args.seed),
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
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_train_dataloader(self):
        """A stream has divided its records among the processes itself."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=True,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """All of a set, in order, at its noise level."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        collate = DiffusionCollator(
            self.processor, self.recipe.masking, self.args.seed, level=eval_dataset.level
        )
        loader = DataLoader(
            eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The recipe's weighting in training, the plain mean at a fixed noise level."""
        weighting = self.loss_weighting if model.training else "none"
        outputs = model(**inputs, loss_weighting=weighting)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def save_model(self, output_dir=None, _internal_call=False):
        """As the Trainer's; a sharded checkpoint too holds the config, the processor and, of a LoRA
        run, the adapter in one piece. Called by every process of a run."""
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

    def save_whole(self):
        """The weights in one piece, config, processor and code in `output_dir`; called by every
        process of a run."""
        if self.is_fsdp_enabled:
            self._save_gathered(self.args.output_dir)
        else:
            self.save_model()

    def _save_gathered(self, folder: str):
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
        """As the Trainer's, with a group for each module that has its own learning rate, and
        Muon for the matrices that the recipe gives to it."""
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

        self.optimizer = cls(groups(others), **options)
        if matrices:
            if self.is_fsdp_enabled:
                raise ValueError("expected no parameters.muon in sharded training, got some")
            muon_groups = [{"lr": self.args.learning_rate, **group} for group in groups(matrices)]
            self.optimizer = WithMuon(muon_groups, self.optimizer)
        return self.optimizer
