"""Offers PerceptionDLM to lmms-eval: answers by denoising, and LLaDA's bound for likelihoods.

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`, so that where both
packages are installed its own command line knows the model:

    lmms-eval --model perceptiondlm --model_args pretrained=PATH,steps=32 --tasks mme \\
        --batch_size 8
"""

import json
import logging
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from ..common.extras import extra
from ..common.loading import load_model
from ..generation_options import DiffusionOptions
from ..processing_sequence import IGNORED_LABEL, encode_text

with extra("lmms"):
    from accelerate import Accelerator
    from lmms_eval.api.instance import GenerationResult, unwrap_generation_output
    from lmms_eval.api.model import lmms

logger = logging.getLogger(__name__)

# Generation arguments of tasks that mean nothing here; any other is warned about.
WITHOUT_MEANING = {"do_sample", "num_beams", "image_aspect_ratio", "use_cache"}


def manifest():
    """Returns what lmms-eval registers."""
    with extra("lmms"):
        from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__name__}.{PerceptionDLMForLMMSEval.__name__}"
    return ModelManifest(model_id="perceptiondlm", simple_class_path=path)


class PerceptionDLMForLMMSEval(lmms):
    """A checkpoint behind lmms-eval's model interface.

    Args:
        pretrained: folder or Hub id; `subfolder`, `dtype`, `device`, `quantize` as for loading it.
        batch_size: questions answered in one call, and masked samples of a likelihood.
        max_batch_size: lmms-eval passes it to every model; nothing is searched for here.
        likelihood_samples: draws of the Monte-Carlo bound; likelihood_seed: of those draws.
        answer_length: pads shorter answers whose likelihood is taken with end-of-turn to so many
            tokens, as a checkpoint trained on fixed slots expects; None: one end-of-turn.
        return_loss: give minus the log-likelihood, because lmms-eval's `multiple_choice` takes the
            smallest value; False for metrics of log-likelihoods (perplexity, mutual information).
        options: of `diffusion_generate`; they win over a task's own.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        subfolder: str = "",
        dtype: str = "auto",
        device: str | None = None,
        quantize: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        likelihood_samples: int = 128,
        likelihood_seed: int = 0,
        answer_length: int | None = None,
        return_loss: bool = True,
        **options,
    ):
        super().__init__()
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())

        # Each of several processes has a device of its own.
        several = self.accelerator.num_processes > 1
        device = str(self.accelerator.device) if several or device is None else device
        self.model, self.processor = load_model(
            pretrained, subfolder, dtype, device, quantize=quantize
        )

        self.options = options
        DiffusionOptions.build(self.model.decoding_defaults, options)
        self.batch_size = int(batch_size)
        self.likelihood_samples = likelihood_samples
        self.likelihood_seed = likelihood_seed
        self.answer_length = answer_length
        self.return_loss = return_loss
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self._reported: set[str] = set()

    def generate_until(self, requests) -> list[str]:
        """Answers requests, in their order; those with the same options are batched."""
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), desc="answer", disable=self.rank > 0) as bar:
            for batch in self._batches(requests):
                arguments = [requests[i].args for i in batch]
                options, until = self.decoding_options(arguments[0][1])
                result = self.model.diffusion_generate(
                    images=[self._images(*args[2:]) for args in arguments],
                    prompts=[args[0] for args in arguments],
                    processor=self.processor,
                    **options,
                )

                for i, row in zip(batch, result.texts, strict=True):
                    answers[i] = cut_at(row[0], until)
                    self.cache_hook.add_partial("generate_until", requests[i].args[:2], answers[i])
                bar.update(len(batch))
        return answers

    def _batches(self, requests) -> Iterator[list[int]]:
        """Yields indices of requests that can be answered together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(i)
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                yield group[first : first + self.batch_size]

    def decoding_options(self, generation: dict) -> tuple[dict, list[str]]:
        """Turns a task's generation arguments into options of `diffusion_generate`.

        A task's length is rounded up to whole blocks. Returns also the strings at which the answer
        is cut.
        """
        generation = {name: value for name, value in generation.items() if value is not None}
        until = generation.pop("until", [])

        options = {}
        if "max_new_tokens" in generation:
            block = self.options.get("block_length") or 1
            options["max_new_tokens"] = -(-int(generation.pop("max_new_tokens")) // block) * block
        temperature, top_p = generation.pop("temperature", 0), generation.pop("top_p", None)
        if temperature > 0:
            options |= {"temperature": temperature} | ({"top_p": top_p} if top_p else {})

        for name in sorted(set(generation) - WITHOUT_MEANING - self._reported):
            logger.warning("generation argument %s=%r is not used", name, generation[name])
            self._reported.add(name)

        return options | self.options, [until] if isinstance(until, str) else list(until)

    def loglikelihood(self, requests) -> list:
        """Returns, for each request, LLaDA's bound of the continuation, and whether it is decoded.

        The bound is in nats (or its negative, see `return_loss`) and includes end of turn; decoded
        means that decoding one token per step gives just this continuation.
        """
        results = []
        for request in tqdm(requests, desc="likelihood", disable=self.rank > 0):
            context, continuation, *rest = request.args
            if callable(continuation):
                doc_id, task, split = rest[1:]
                continuation = continuation(self.task_dict[task][split][doc_id])

            images = self._images(*rest) if rest else []
            results.append(as_response(self._likelihood(context, continuation.strip(), images)))
        return results

    def _likelihood(self, context: str, continuation: str, images: list) -> tuple[float, bool]:
        """Returns the bound or its negative, and whether decoding gives the continuation."""
        ((bound,),) = self.model.diffusion_score(
            [images],
            texts=[continuation],
            prompts=[context],
            samples=self.likelihood_samples,
            seed=self.likelihood_seed,
            length=self._slot(continuation),
            batch_size=self.batch_size,
            processor=self.processor,
        )
        is_greedy = self._is_greedy(context, continuation, images)
        return (-bound if self.return_loss else bound), is_greedy

    def _slot(self, text: str) -> int:
        """Returns the tokens to which an answer is padded; 0: it is closed by one end-of-turn."""
        length = len(encode_text(self.processor.tokenizer, text))
        return self.answer_length if length < (self.answer_length or 0) else 0

    def _is_greedy(self, context: str, continuation: str, images: list) -> bool:
        inputs, target = self._masked_answer(context, continuation, images)
        decoded = self.model.diffusion_generate(inputs=inputs, processor=self.processor)
        return decoded.token_ids[0][0] == target.tolist()

    def _masked_answer(self, context: str, text: str, images: list) -> tuple[dict, torch.Tensor]:
        """Makes the network's inputs with the answer masked; returns them and the answer's ids."""
        slot = self._slot(text) or None
        inputs = dict(
            self.processor([images], prompts=[context], answers=[text], max_new_tokens=slot)
        )
        labels = inputs.pop("labels")
        answer = labels != IGNORED_LABEL
        masked = inputs["input_ids"].masked_fill(answer, self.model.config.mask_token_id)
        return inputs | {"input_ids": masked}, labels[answer]

    def generate_until_multi_round(self, requests) -> list[str]:
        """Refuses such tasks, which lmms-eval's interface provides for."""
        raise NotImplementedError("expected tasks of one round: a turn ends with its answer")

    def _images(self, doc_to_visual, doc_id, task, split) -> list:
        """Returns a document's images. Raises ValueError for video or other kinds of content."""
        images = list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])
        for image in images:
            if isinstance(image, (str, dict)):
                raise ValueError(
                    f"expected images for {task}, document {doc_id}, got {type(image).__name__}"
                )
        return images


def as_response(pair: tuple[float, bool]):
    """Wraps a likelihood where lmms-eval would else make text of the pair, as 0.7.3 does."""
    kept, _ = unwrap_generation_output(pair)
    return pair if kept == pair else GenerationResult(pair)


def cut_at(text: str, until: Sequence[str]) -> str:
    """Returns the text before the first of some strings."""
    places = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(places)].strip() if places else text
