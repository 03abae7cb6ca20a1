"""Times answers in blocks, and what keeping keys and values within a block costs.

    python -m perceptiondlm.benchmarks.long_answers --tokens 256,512 --output result.json

Speed and the share of equal tokens are those of a preset with random weights, which answers a
question about a noise image; all ways alternate in one run. `ratio` is the exact way's seconds over
a way's. Random weights say little about tokens, so the same ways also caption regions of held-out
scenes of shapes with the trained model of `tests/shapes_model`: one region a row, its caption in
blocks.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch

from ..common.files import write_json
from ..common.loading import load_model
from ..evaluation.held_out import held_out_scenes
from ..evaluation.synthetic_judge import score_captions
from .denoising import describe_machine, timed
from .workload import (
    PRESETS,
    TRAINED,
    TRAINED_SUBFOLDER,
    build_model,
    build_tokenizer,
    question_inputs,
    set_layout,
)

WAYS = {
    "exact": {},
    "prefix": {"block_cache": "prefix"},
    "dual": {"block_cache": "dual"},
    "dual, threshold 0.9": {"block_cache": "dual", "threshold": 0.9},
}
CAPTION_LENGTH, CAPTION_BLOCK = 12, 4  # of that model, in tokens


def measure(arguments: argparse.Namespace) -> dict:
    """Measures speed, then the share of equal tokens and the accuracy on scenes."""
    tokenizer = build_tokenizer()
    model = build_model(arguments.preset, tokenizer, arguments.device)
    processor = set_layout(model, tokenizer, "released")
    rows = []
    for tokens in arguments.tokens:
        inputs = question_inputs(processor, 1, tokens).to(arguments.device)
        rows += speed(model, inputs, tokens, arguments)
    return {
        "machine": describe_machine(arguments.device) | {"load": os.getloadavg()},
        "torch": torch.__version__,
        "preset": arguments.preset,
        "block_length": arguments.block_length,
        "repeats": arguments.repeats,
        "rows": rows,
        "scenes": quality(arguments.scenes) if arguments.scenes else None,
    }


def speed(model, inputs: dict, tokens: int, arguments: argparse.Namespace) -> list[dict]:
    """Times each way of one answer; returns their rows."""
    steps = tokens // arguments.tokens_per_step
    seconds, told = {name: [] for name in arguments.ways}, {}
    for _ in range(arguments.repeats):
        for name in arguments.ways:

            def run(name=name) -> int:
                told[name] = model.diffusion_generate(
                    inputs=inputs, steps=steps, block_length=arguments.block_length, **WAYS[name]
                )
                return told[name].num_forwards

            seconds[name].append(timed(run, arguments.device)[0])
            print(f"{tokens} tokens, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr)

    medians = {name: statistics.median(own) for name, own in seconds.items()}
    return [
        {
            "tokens": tokens,
            "prompt_tokens": inputs["input_ids"].shape[1] - tokens,
            "steps": steps,
            "way": name,
            "seconds": medians[name],
            "all_seconds": seconds[name],
            "forwards": told[name].num_forwards,
            "ratio": medians["exact"] / medians[name],
            "equal_tokens": equal_share(told[name], told["exact"]),
        }
        for name in arguments.ways
    ]


def equal_share(output, exact) -> float:
    """Returns the share of an output's tokens that the exact one has in the same places."""
    pairs = [
        pair
        for own, others in zip(output.token_ids, exact.token_ids, strict=True)
        for response, other in zip(own, others, strict=True)
        for pair in zip(response, other, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def quality(num_scenes: int) -> dict:
    """Captions regions of held-out scenes with the trained model, in blocks; rows by way."""
    model, processor = load_model(TRAINED, subfolder=TRAINED_SUBFOLDER)
    scenes = held_out_scenes(100_000, num_scenes, progress=False)
    told: dict[str, list] = {name: [] for name in WAYS}
    for scene in scenes:
        # Regions in rows of their own, to be decoded as answers are.
        masks = [[thing.mask] for thing in scene.objects]
        images = [scene.image] * len(masks)
        inputs = processor(images=images, masks=masks, caption_length=CAPTION_LENGTH)
        inputs["task"] = "answers"
        for name, options in WAYS.items():
            told[name].append(
                model.diffusion_generate(
                    inputs=inputs, processor=processor, block_length=CAPTION_BLOCK, **options
                )
            )

    rows = []
    for name, outputs in told.items():
        captions = [[row[0] for row in output.texts] for output in outputs]
        shares = [equal_share(a, b) for a, b in zip(outputs, told["exact"], strict=True)]
        rows.append(
            {
                "way": name,
                "forwards": sum(output.num_forwards for output in outputs),
                "equal_tokens": statistics.mean(shares),
                "same_captions": _same(captions, [[r[0] for r in o.texts] for o in told["exact"]]),
                "scores": score_captions(scenes, captions),
            }
        )
    return {"scenes": num_scenes, "block_length": CAPTION_BLOCK, "rows": rows}


def _same(captions: list[list[str]], others: list[list[str]]) -> float:
    pairs = [
        (a, b)
        for own, theirs in zip(captions, others, strict=True)
        for a, b in zip(own, theirs, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    answering = [n for n, (fields, _) in PRESETS.items() if fields.get("num_region_prompts") == 0]
    add = parser.add_argument
    add("--preset", choices=answering, default="llada-v-cpu")
    add("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[256, 512])
    add("--block-length", type=int, default=32)
    add("--tokens-per-step", type=int, default=1)
    add("--ways", type=lambda text: text.split(";"), default=list(WAYS), help="exact;dual, say")
    add("--repeats", type=int, default=1)
    add("--scenes", type=int, default=50, help="held-out scenes for the trained model; 0: none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="JSON file to write")
    parsed = parser.parse_args(arguments)
    unknown = sorted(set(parsed.ways) - set(WAYS))
    if unknown or "exact" not in parsed.ways:
        parser.error(f"expected ways among {list(WAYS)}, exact among them, got {parsed.ways}")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a line for each way and writes the JSON."""
    parsed = parse(arguments)
    result = measure(parsed)
    for row in result["rows"]:
        print(
            f"{row['tokens']} tokens, {row['way']}: {row['seconds']:.2f} s, {row['ratio']:.1f}x,"
            f" {row['forwards']} forward passes, {row['equal_tokens']:.1%} equal tokens"
        )
    for row in (result["scenes"] or {"rows": []})["rows"]:
        print(f"scenes, {row['way']}: {row['equal_tokens']:.1%} equal tokens, {row['scores']}")
    if parsed.output:
        write_json(parsed.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
