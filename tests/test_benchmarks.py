"""The benchmark's baseline computes what ours does, and its results are written as documented."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from perceptiondlm.benchmarks import (
    ablation,
    denoising,
    loading,
    offload,
    training_step,
    workload,
)
from perceptiondlm.benchmarks.published import caption_regions_plainly
from perceptiondlm.benchmarks.report import END, START, update_readme

MINI = {
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    },
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


@pytest.fixture
def mini(monkeypatch):
    """Adds a preset that runs in a second."""
    monkeypatch.setitem(workload.PRESETS, "mini", (MINI, torch.float32))


def test_the_published_way_and_the_exact_one_give_the_same_ids(mini):
    tokenizer = workload.build_tokenizer()
    model = workload.build_model("mini", tokenizer, "cpu")
    processor = workload.set_layout(model, tokenizer, "released")
    inputs = workload.region_inputs(processor, num_regions=8, num_images=1, caption_length=6)
    plain = caption_regions_plainly(model, inputs, steps=4)
    ours = model.diffusion_generate(inputs=inputs, steps=4).token_ids
    assert plain == [[token for caption in row for token in caption] for row in ours]


def test_a_run_writes_every_documented_field(mini, tmp_path):
    output = tmp_path / "result.json"
    methods = ["published", *denoising.METHODS]
    methods.remove("independent-compiled")
    code = denoising.main(
        f"--preset mini --regions 1,7 --images 1 --methods {','.join(methods)} --steps 4 --budget 2"
        f" --caption-length 4 --repeats 1 --device cpu --output {output} --plots {tmp_path}".split()
    )
    result = json.loads(output.read_text())
    assert code == 0
    assert {"machine", "versions", "preset", "rows", "floor"} <= set(result)
    assert len(result["rows"]) == 2 * len(methods)
    wanted = {"method", "regions", "images", "seconds", "ratio", "forwards"}
    wanted |= {"tokens_per_forward", "peak_bytes"}
    assert all(wanted <= set(row) for row in result["rows"])
    assert (tmp_path / "latency-mini.png").exists() and (tmp_path / "floor-mini.png").exists()
    passes = {
        row["regions"]: row["forwards"] for row in result["rows"] if row["method"] == "published"
    }
    assert passes == {1: 4, 7: 8}  # seven regions take two passes


def test_a_method_there_is_none_of_is_a_usage_error(mini, capsys):
    with pytest.raises(SystemExit) as stopped:
        denoising.parse(["--methods", "published,faster"])
    assert stopped.value.code == 2
    assert "faster" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_a_method_runs_in_another_precision_beside_its_own(mini, tmp_path, precision):
    output = tmp_path / "out.json"
    name = f"independent-exact@{precision}"
    methods = f"published,independent-exact,{name}"
    sizes = ["--steps", "2", "--repeats", "1", "--caption-length", "4"]
    denoising.main(["--preset", "mini", "--methods", methods, *sizes, "--output", str(output)])
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    assert {name: row["precision"] for name, row in rows.items()} == {
        "published": None,
        "independent-exact": None,
        name: precision,
    }
    assert rows[name]["exact"] and rows[name]["ratio"] > 0


def test_all_methods_and_sizes_are_one_option(mini):
    parsed = denoising.parse(["--preset", "mini", "--all", "--device", "cuda"])
    assert parsed.regions == [1, 2, 4, 6, 12, 24] and parsed.images == [1, 8]
    assert {"published", "released-exact", "independent-adaptive@fp8"} <= set(parsed.methods)
    answers = denoising.parse(["--preset", "llada-v-cpu", "--all", "--device", "cpu"])
    assert all(name.split("-")[0] in ("published", "released") for name in answers.methods)


@pytest.mark.parametrize("methods", ["published@int8", "independent-exact@int3"])
def test_a_precision_there_is_none_of_is_a_usage_error(mini, capsys, methods):
    with pytest.raises(SystemExit):
        denoising.parse(["--preset", "mini", "--methods", methods])
    assert "@bfloat16" in capsys.readouterr().err


def test_the_readme_table_is_replaced_between_its_markers(mini, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    options = "--preset mini --steps 2 --budget 1 --caption-length 2 --repeats 1 --device cpu"
    denoising.main([*options.split(), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith(f"before\n{START}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text and "independent-exact" in text


def test_a_readme_without_markers_is_refused(mini, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="expected the markers"):
        update_readme(readme, {"rows": []})


@pytest.fixture
def ablate(tmp_path, monkeypatch):
    """Runs the ablation of a recipe with pretended training and measuring, which it counts."""

    shapes = Path(__file__).parent.parent / "configs" / "shapes.yaml"

    def pretend(*command):
        """Training makes weights, measuring a report; each is noted."""
        calls.append(command)
        if command[0] == "train":
            folder = next(c for c in command if c.startswith("trainer.output_dir=")).split("=")[1]
            (Path(folder) / "model.safetensors").touch()
            return
        scores = dict.fromkeys(ablation.COLUMNS.values(), 0.5)
        if "things" in command:
            scores = thing_scores(Path(command[command.index("--model") + 1]))
        sizes = {name: int(command[command.index(f"--{name}") + 1]) for name in ("scenes", "seed")}
        report = {
            **scores,
            **sizes,
            "per_attribute": {"shape": 0.25},
            "forwards": 22,
            "regions": 4,
            "seconds": 1.0,
        }
        Path(command[command.index("--output") + 1]).write_text(json.dumps(report))

    def thing_scores(folder: Path) -> dict:
        """Names are the likelier, the later the seed, and the sequential row has no relations."""
        seed = int(folder.name.split("-")[1])
        names = {"name_accuracy": 0.25 * (1 + seed), "exact_caption_rate": 0.5}
        parts = {"relation_accuracy": None, "grammatical": 1.0, "mixture_rate": 0.0} | names
        return parts | {"attribute_accuracy": 0.5, "overlapping": parts, "apart": parts}

    def run(*arguments, recipe=shapes) -> list[tuple]:
        before = len(calls)
        monkeypatch.setattr(
            "sys.argv",
            [
                "ablation",
                str(recipe),
                *arguments,
                "--runs",
                str(tmp_path / "runs"),
                "--output",
                str(output),
            ],
        )
        ablation.main()
        return calls[before:]

    calls, output = [], tmp_path / "result.json"
    monkeypatch.setattr(ablation, "run_command", pretend)
    return run, output


def test_the_ablation_writes_a_row_for_each_variant_and_keeps_what_is_done(ablate):
    run, output = ablate
    calls = run("model.max_tiles=4", "--scenes", "2")
    trained = [command for command in calls if command[0] == "train"]
    assert len(calls) == 5 + 6  # the sequential row uses the full one's weights
    assert len(trained) == 5 and all("model.max_tiles=4" in command for command in trained)
    result = json.loads(output.read_text())
    assert [row["row"] for row in result["rows"]] == list(ablation.ROWS)
    lines = output.with_suffix(".md").read_text().splitlines()
    assert "shapes.yaml model.max_tiles=4` on the captions" in lines[0]
    assert "| released layout | 50.0 | 50.0 | 50.0 | 50.0 | 25.0 | 11.0 |" in lines
    assert run("model.max_tiles=4", "--scenes", "2") == []


def test_every_seed_of_a_row_is_trained_and_the_table_has_means_and_ranges(ablate):
    run, output = ablate
    sizes = ("--scenes", "2", "--training-scenes", "9", "--seeds", "3")
    calls = run("data.scene_kind=things", "trainer.seed=5", *sizes, "--rows", "full,sequential")
    trained = [command for command in calls if command[0] == "train"]
    assert len(trained) == 3 and len(calls) == 3 + 6  # two rows share the weights of each seed
    seeds = [[c for c in command if c.startswith("trainer.seed")][-1] for command in trained]
    assert seeds == ["trainer.seed=5", "trainer.seed=6", "trainer.seed=7"]
    first = [int(c.split("=")[1]) for cmd in trained for c in cmd if "data.first_seed" in c]
    assert first[0] == 0 and all(b - a > 10**6 for a, b in zip(first, first[1:], strict=False))
    measured = [command for command in calls if command[0] == "evaluate"]
    assert all("things" in command and "--skip" in command for command in measured)

    row = json.loads(output.read_text())["rows"][0]
    assert row["name_accuracy"] == 0.5 and row["spread"]["name_accuracy"] == [0.25, 0.75]
    assert [one["apart"]["name_accuracy"] for one in row["seeds"]] == [0.25, 0.5, 0.75]
    assert row["relation_accuracy"] is None is row["spread"]["relation_accuracy"]
    lines = output.with_suffix(".md").read_text().splitlines()
    titles, cells = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (2, 4))
    found = dict(zip(titles, cells, strict=True))
    assert "Means of 3 seeds" in lines[0] and found[""] == "full"
    assert found["names"] == found["overlapping: names"] == "50.0 (25.0 to 75.0)"
    assert found["relations"] == "" and found["apart: whole captions"] == "50.0 (50.0 to 50.0)"


def test_an_ablation_of_things_trains_on_captions_alone(ablate, tmp_path):
    run, _ = ablate
    things = Path(__file__).parent.parent / "configs" / "tiny.yaml"
    run("--rows", "full", recipe=things)
    recipe = json.loads((tmp_path / "runs/full/seed-0/recipe.json").read_text())
    names = ("region_share", "first_region_share", "label_share", "first_label_share")
    shares = [recipe["data"][name] for name in (*names, "region_question_share")]
    assert shares == [1.0, None, 0.0, None, 0.0]


def test_an_ablation_of_labels_trains_on_labels_alone_and_measures_them(
    ablate, tmp_path, monkeypatch
):
    run, output = ablate
    asked = []

    def pretend(folder, regions_per_pass, arguments):
        asked.append((folder.parent.name, regions_per_pass))
        shares = {"overlapping_label_accuracy": 0.25, "apart_label_accuracy": 0.75}
        sizes = {"scenes": arguments.scenes, "seed": arguments.seed}
        costs = {"per_attribute": {}, "forwards": 22, "regions": 4, "seconds": 1.0}
        return {"label_accuracy": 0.5, **shares, **sizes, **costs}

    monkeypatch.setattr(ablation, "measure_labels", pretend)
    things = Path(__file__).parent.parent / "configs" / "tiny.yaml"
    run("--labels", "--scenes", "2", "--rows", "full,sequential,no-prompts", recipe=things)
    assert asked == [("full", None), ("full", 1), ("no-prompts", None)]
    recipe = json.loads((tmp_path / "runs/full/seed-0/recipe.json").read_text())
    names = ("region_share", "label_share", "first_label_share", "region_question_share")
    assert [recipe["data"][name] for name in names] == [1.0, 1.0, None, 0.0]
    lines = output.with_suffix(".md").read_text().splitlines()
    assert "on the labels of 12000 scenes" in lines[0]
    assert lines[2] == "| | labels | overlapping: labels | apart: labels | forwards per image |"
    assert "| no region prompts | 50.0 | 25.0 | 75.0 | 11.0 |" in lines


@pytest.mark.parametrize(
    "recipe, given, message",
    [
        ("regions", (), "expected a recipe of synthetic scenes"),
        ("shapes", ("--labels",), "expected a recipe of things with --labels, got one of shapes"),
        ("shapes", ("--seeds", "0"), "expected seeds of 1 or more, got 0"),
    ],
)
def test_an_ablation_that_makes_no_sense_is_a_usage_error(capsys, recipe, given, message):
    path = Path(__file__).parent.parent / "configs" / f"{recipe}.yaml"
    with pytest.raises(SystemExit):
        ablation.parse([str(path), *given, "--output", "r.json"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, named",
    [
        (("model.max_tiles=2", "--scenes", "2"), "expected model"),
        (("model.max_tiles=4", "--scenes", "3"), "expected scenes 3"),
        (("model.max_tiles=4", "--scenes", "2", "--steps", "9"), "expected trainer"),
    ],
)
def test_the_ablation_refuses_kept_rows_of_another_run(ablate, changed, named):
    run, _ = ablate
    run("model.max_tiles=4", "--scenes", "2")
    with pytest.raises(ValueError, match=named):
        run(*changed)


def test_a_training_step_is_measured_with_the_recipe_s_own_trainer(mini, tmp_path):
    output = tmp_path / "result.json"
    recipe = Path(__file__).parent.parent / "configs" / "regions_lora.yaml"
    options = [
        "trainer.use_cpu=true",
        "trainer.dataloader_num_workers=0",
        "trainer.gradient_accumulation_steps=2",
        "--preset",
        "mini",
        "--steps",
        "2",
    ]
    training_step.main([str(recipe), *options, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["samples_a_step"] == 2
    assert len(result["all_seconds"]) == training_step.WARM_UP + 2 == len(result["losses"])
    assert 0 < result["learning"] < result["parameters"]
    assert all(0 < loss < float("inf") for loss in result["losses"])


def test_streamed_weights_are_measured_against_the_floor(mini, tmp_path, monkeypatch):
    output = tmp_path / "offload.json"
    arguments = ["--preset", "mini", "--images", "1", "--repeats", "1", "--caption-length", "4"]
    monkeypatch.setattr("sys.argv", ["offload", *arguments, "--output", str(output)])
    offload.main()
    result = json.loads(output.read_text())
    assert [row["layout"] for row in result["rows"]] == ["released", "independent"]
    layers = workload.build_model("mini", workload.build_tokenizer(), "cpu").language_model.model
    assert result["layer_bytes"] == 4 * sum(p.numel() for p in layers.layers.parameters())
    assert all(row["reading"] > 0 for row in result["rows"])


@pytest.mark.slow
def test_loading_reports_the_memory_of_a_fresh_process(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHARD_BYTES", 20_000)  # several shards
    output = tmp_path / "loading.json"
    arguments = ["--preset", "mini", "--precisions", "none", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["loading", *arguments])
    loading.main()
    result = json.loads(output.read_text())
    model = workload.build_model("mini", workload.build_tokenizer(), "cpu")
    weights = model.state_dict().values()
    assert result["checkpoint_bytes"] == sum(w.numel() * w.element_size() for w in weights)
    (row,) = result["rows"]
    assert 0 < row["before_bytes"] <= row["loaded_bytes"] <= row["own_bytes"]
    assert row["own_bytes"] < row["resident_bytes"]


def test_peaks_are_read_as_the_system_tells_them(tmp_path):
    code = "x = b'x' * 100_000_000; print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        peaks = loading.memory_of(process.pid)
        process.communicate(b"\n")
    assert 100_000_000 < peaks["own_bytes"] < peaks["resident_bytes"]
    assert loading.memory_of(process.pid) == {"own_bytes": 0, "resident_bytes": 0}
