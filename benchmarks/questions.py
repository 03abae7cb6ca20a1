"""Measures what several questions about one image cost, against one question.

    python -m perceptiondlm.benchmarks.questions --preset cpu --questions 8 --output questions.json

The image is encoded and its trunk computed once (`model.see`). In one run one question, all of them
together on what was seen, and each in a call of its own alternate; medians are reported. The token
ids of the last two are compared.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from ..common.files import write_json
from .denoising import describe_machine
from .workload import PRESETS, build_model, build_tokenizer, noise_image, set_layout

# Of different lengths, as people's are.
QUESTIONS = [f"What is the {'very ' * (k % 5)}best name of thing number {k}?" for k in range(64)]


def measure(arguments) -> dict:
    """Times the three ways; returns the result to write."""
    tokenizer = build_tokenizer()
    model = build_model(arguments.preset, tokenizer, arguments.device)
    processor = set_layout(model, tokenizer, "independent")
    image = noise_image(np.random.default_rng(0))
    questions = QUESTIONS[: arguments.questions]
    options = {"max_new_tokens": arguments.new_tokens, "steps": arguments.steps}

    def ask(given, prompts):
        return model.diffusion_generate(given, prompts=prompts, processor=processor, **options)

    ways = {
        "one": lambda: ask(model.see(image, processor=processor), questions[:1]),
        "together": lambda: ask(model.see(image, processor=processor), questions),
        "apart": lambda: [ask(image, question) for question in questions],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for repeat in range(arguments.repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            if arguments.device != "cpu":
                torch.accelerator.synchronize()
            if repeat:  # the first is to warm up
                seconds[name].append(time.perf_counter() - started)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    apart = [out.token_ids[0] for out in results["apart"]]
    return {
        "machine": describe_machine(arguments.device),
        "preset": arguments.preset,
        "questions": len(questions),
        "new_tokens": arguments.new_tokens,
        "steps": arguments.steps,
        "repeats": arguments.repeats,
        "seconds": medians,
        "ratio": medians["together"] / medians["one"],
        "ratio_apart": medians["apart"] / medians["one"],
        "same_ids": results["together"].token_ids == apart,
    }


def main():
    """Measures, prints the ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args()

    result = measure(arguments)
    if arguments.output:
        write_json(arguments.output, result)
    print(
        f"{result['questions']} questions cost {result['ratio']:.2f} times one, each alone"
        f" {result['ratio_apart']:.2f} times; same ids: {result['same_ids']}"
    )


if __name__ == "__main__":
    main()
