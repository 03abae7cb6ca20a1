"""Adds a checkpoint to VLMEvalKit's models, and runs its command line.

VLMEvalKit (the package `vlmeval`, installed from its repository) looks models up by name in
`vlmeval.config.supported_VLM`. This command adds a checkpoint there, then runs a script of
VLMEvalKit's:

    python -m perceptiondlm.evaluation.vlmevalkit_adapter --checkpoint PATH --option steps=32 \\
        VLMEvalKit/run.py --model perceptiondlm --data MMBench_DEV_EN
"""

import argparse
import functools
import runpy
import sys

from vlmeval.vlm.base import BaseModel

from ..common.loading import default_device, load_model
from ..generation_options import DiffusionOptions
from .checkpoint import add_option_argument

MODEL_NAME = "perceptiondlm"


class PerceptionDLMForVLMEvalKit(BaseModel):
    """A checkpoint behind VLMEvalKit's model interface.

    Args:
        model_path: folder or Hub id; `subfolder`, `dtype`, `device`, `quantize` as for loading it.
        options: of `diffusion_generate`.
    """

    INTERLEAVE = True  # images stand in the prompt where the message has them

    def __init__(
        self,
        model_path: str,
        subfolder: str = "",
        dtype: str = "auto",
        device: str | None = None,
        quantize: str | None = None,
        **options,
    ):
        super().__init__()
        self.model, self.processor = load_model(
            model_path, subfolder, dtype, device or default_device(), quantize=quantize
        )
        self.options = options
        defaults = self.model.decoding_defaults
        self.max_new_tokens = DiffusionOptions.build(defaults, options).max_new_tokens

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """Answers one message, a list of `{"type": "image" or "text", "value": ...}`."""
        kinds = {part["type"] for part in message}
        if not kinds <= {"image", "text"}:
            raise ValueError(f"expected parts of type image and text, got {sorted(kinds)}")

        content = [
            {"type": "image"}
            if part["type"] == "image"
            else {"type": "text", "text": str(part["value"])}
            for part in message
        ]

        # The template puts each image where the message has it.
        conversation = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(conversation, add_generation_prompt=True)

        images = [part["value"] for part in message if part["type"] == "image"]
        inputs = self.processor(images, text=[prompt], max_new_tokens=self.max_new_tokens)
        result = self.model.diffusion_generate(
            inputs=dict(inputs), processor=self.processor, **self.options
        )
        return result.texts[0][0]


def register(model_path: str, name: str = MODEL_NAME, **options):
    """Adds a checkpoint to VLMEvalKit's models under a name."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = functools.partial(PerceptionDLMForVLMEvalKit, model_path, **options)


def main(arguments: list[str] | None = None):
    """Registers a checkpoint and runs a script of VLMEvalKit's with the arguments after it."""
    parser = argparse.ArgumentParser(prog="vlmevalkit_adapter", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id")
    parser.add_argument("--subfolder", default="")
    parser.add_argument("--name", default=MODEL_NAME, help="for VLMEvalKit's --model")
    add_option_argument(parser)
    parser.add_argument("script", help="VLMEvalKit's run.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of that script")
    args = parser.parse_args(arguments)
    register(args.checkpoint, args.name, subfolder=args.subfolder, **dict(args.options))
    sys.argv = [args.script, *args.arguments]
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
