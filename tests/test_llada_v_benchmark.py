"""The benchmark of LLaDA-V: its baseline answers what ours does."""

import json

import pytest
import torch
from perceptiondlm.benchmarks import denoising, workload
from perceptiondlm.benchmarks.published import answer_questions_plainly

MINI = {
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    **workload.LLAVA_LAYOUT,
}


@pytest.fixture
def mini(monkeypatch):
    """Adds a preset that runs in a second."""
    monkeypatch.setitem(workload.PRESETS, "mini", (MINI, torch.float32))


@pytest.mark.parametrize("steps", [5, 8])
def test_the_published_way_and_the_exact_one_give_the_same_answers(mini, steps):
    tokenizer = workload.build_tokenizer()
    model = workload.build_model("mini", tokenizer, "cpu")
    processor = workload.set_layout(model, tokenizer, "released")
    inputs = workload.question_inputs(processor, num_images=2, max_new_tokens=8)
    plain = answer_questions_plainly(model, inputs, steps)
    ours = model.diffusion_generate(inputs=inputs, steps=steps).token_ids
    assert plain == [row[0] for row in ours]


def test_a_run_writes_a_row_for_each_method(mini, tmp_path):
    methods = ["published", "released-exact", "released-cached", "released-cached-8"]
    methods += ["released-adaptive"]
    output = tmp_path / "result.json"
    denoising.main(
        f"--preset mini --images 1,2 --methods {','.join(methods)} --steps 4 --budget 2"
        f" --caption-length 8 --repeats 1 --device cpu --output {output}".split()
    )
    rows = json.loads(output.read_text())["rows"]
    assert [(row["method"], row["images"]) for row in rows] == [
        (name, images) for images in (1, 2) for name in methods
    ]
    forwards = {(row["method"], row["images"]): row["forwards"] for row in rows}
    assert forwards["published", 2] == forwards["released-exact", 2] == 8
    assert forwards["released-adaptive", 1] == 2
    assert all(row["regions"] == 1 for row in rows)


def test_the_tree_is_no_way_to_answer(mini, capsys):
    with pytest.raises(SystemExit):
        denoising.parse(["--preset", "mini", "--methods", "published,independent-exact"])
    assert "released-exact" in capsys.readouterr().err
    assert denoising.parse(["--preset", "mini"]).methods == ["published", "released-exact"]


@pytest.mark.parametrize("preset", ["llada-v-cpu", "llada-v-8b"])
def test_the_presets_are_models_of_its_kind(preset):
    fields, _ = workload.PRESETS[preset]
    config = workload.PerceptionDLMConfig(**fields)
    assert config.image_layout == "anyres" and config.anyres_max_tiles == 4
    assert config.cells_per_side == {"llada-v-cpu": 13, "llada-v-8b": 27}[preset]
