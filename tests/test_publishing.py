"""Publishing, with the Hub's real client against a Hub on loopback."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main
from perceptiondlm.common.fingerprints import weights_fingerprint
from perceptiondlm.common.loading import load_model
from perceptiondlm.conversion import command as convert_checkpoint
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.publishing.card import checksums, model_card, write_card
from perceptiondlm.publishing.provenance import Provenance, write_provenance
from perceptiondlm.publishing.upload import expect_report_of, push_folder
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "fixtures" / "vectors"
IMAGE = VECTORS / "region_0.png"
MASKS = [VECTORS / f"region_0_mask_{i}.png" for i in range(3)]
REPO = "somebody/captioner"
REPORT = {
    "summary": {"average": 0.624, "average_positive": 0.5, "average_negative": 0.748},
    "scoring": {"annotations": "MSALab/ParaDLC-Bench"},
    "prediction_run": {"throughput": {"nominal_tpf": 2.9}},
    "judge_run": {"judge": {"model": "a-judge"}},
}


# A reader's program: what it prints is compared below. It knows nothing of this package.
READER = """
import json
from transformers import AutoModel, AutoProcessor

image, masks = {image!r}, {masks!r}

def captions(name, **options):
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    out = model.diffusion_generate(image, masks, caption_length=8, **options)
    return model, [out.token_ids[0], out.texts[0]]

processor = AutoProcessor.from_pretrained({repo!r}, trust_remote_code=True)
model, published = captions({repo!r}, processor=processor)
model.push_to_hub("somebody/again")
processor.push_to_hub("somebody/again")
_, pushed = captions("somebody/again")
print("=====")
exec({snippet!r})
print("=====")
print(json.dumps([published, pushed]))
"""


@pytest.fixture
def hub():
    with loopback_hub() as server:
        yield server


@contextlib.contextmanager
def loopback_hub():
    """A Hub that this process's client talks to."""
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        patch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template
        )
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A region model in three shards."""
    folder = tmp_path_factory.mktemp("sharded") / "checkpoint"
    return convert(VECTORS / "released-region", folder, max_shard_size="600KB")


@pytest.fixture
def checkpoint(sharded, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def reader(sharded, tmp_path_factory):
    """What the reader's program, a fresh process, prints in its three parts; and the Hub."""
    home = tmp_path_factory.mktemp("reader")
    with loopback_hub() as hub:
        push_folder(shutil.copytree(sharded, home / "published"), REPO)
        snippet = re.search(r"```python\n(.*?)```", hub.read(REPO, "README.md"), re.DOTALL)[1]
        program = READER.format(
            repo=REPO, image=str(IMAGE), masks=[str(mask) for mask in MASKS], snippet=snippet
        )
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "PATH": os.environ["PATH"],
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        yield done.stdout.split("=====\n"), hub


@pytest.fixture(scope="module")
def expected(sharded):
    """Ids and captions of the folder that was published."""
    captioner = RegionCaptioner.from_pretrained(sharded)
    out = captioner.model.diffusion_generate(
        IMAGE, MASKS, processor=captioner.processor, caption_length=8
    )
    return [out.token_ids[0], out.texts[0]]


def test_a_published_model_captions_alike_in_a_fresh_process(reader, expected):
    (*_, results), _ = reader
    assert json.loads(results)[0] == expected


def test_push_to_hub_of_model_and_processor_makes_a_repository_that_captions_alike(
    reader, expected
):
    (*_, results), _ = reader
    assert json.loads(results)[1] == expected


def test_push_to_hub_is_transformers_own_and_publishing_writes_the_card(reader):
    _, hub = reader
    assert "push_to_hub" not in vars(PerceptionDLMForConditionalGeneration)
    card = ModelCard(hub.read(REPO, "README.md"))
    assert card.data.pipeline_tag == "image-text-to-text"
    assert f'from_pretrained("{REPO}", trust_remote_code=True' in card.text


def test_the_snippet_on_the_card_runs_as_pasted(reader):
    (_, printed, _), _ = reader
    assert re.match(r"1 .*2 ", printed, re.DOTALL)


def test_the_readers_code_and_weights_come_from_the_hub(reader):
    _, hub = reader
    assert hub.count("GET", rf"/{REPO}/resolve/.*/modeling_perceptiondlm.py")
    assert hub.count("GET", "/large/") >= 3


def test_a_repository_is_published_in_one_commit(hub, checkpoint):
    push_folder(checkpoint, REPO)
    assert hub.count("POST", "/commit/main") == 1
    expected = {file.name for file in checkpoint.iterdir()} | {".gitattributes"}
    assert hub.files(REPO) == expected


def test_only_what_belongs_to_the_model_is_sent(hub, checkpoint, caplog):
    """What training, an editor or a careless copy leaves in a folder stays there."""
    strangers = ["training_args.bin", "optimizer.pt", "id_rsa", "secrets.json", "notes.py", ".env"]
    for name in [*strangers, "checkpoint-10/model.safetensors", "data/train.jsonl"]:
        path = checkpoint / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("private")
    push_folder(checkpoint, REPO)
    sent = set(hub.files(REPO))
    assert {"config.json", "LICENSE", "README.md", "modeling_perceptiondlm.py"} <= sent
    assert not sent & {*strangers, "checkpoint-10/model.safetensors", "data/train.jsonl"}
    assert "secrets.json" in caplog.text and "checkpoint-10" in caplog.text


@pytest.mark.parametrize("name", ["generation_config.json", "LICENSE"])
def test_a_link_out_of_the_folder_is_not_followed(hub, checkpoint, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("private")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"got {name}, a link to .*secret"):
        push_folder(checkpoint, REPO)


def test_a_snapshot_of_the_hubs_cache_is_published_through_its_links(hub, checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in checkpoint.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    push_folder(snapshot, REPO)
    assert {"config.json", "LICENSE"} <= set(hub.files(REPO))


def test_an_upload_that_fails_half_way_leaves_main_untouched(hub, checkpoint):
    push_folder(checkpoint, REPO)
    before = hub.repositories[REPO].branches["main"]
    for shard in checkpoint.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes() + b" ")
    hub.fail("PUT", "/large/", after=1)
    with pytest.raises(RuntimeError, match="safetensors"):
        push_folder(checkpoint, REPO)
    assert hub.repositories[REPO].branches["main"] == before


def test_a_commit_that_fails_leaves_main_untouched(hub, checkpoint):
    hub.fail("POST", "/commit/")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        push_folder(checkpoint, REPO)
    assert hub.files(REPO) == {".gitattributes"}


def test_a_retry_sends_only_what_is_not_there_yet(hub, checkpoint):
    hub.fail("PUT", "/large/", after=2)
    with pytest.raises(RuntimeError):
        push_folder(checkpoint, REPO)
    sent = len(hub.large_files)
    assert sent == 2
    hub.requests.clear()
    push_folder(checkpoint, REPO)
    assert sum(hub.uploads().values()) == 3 - sent
    assert "model-00003-of-00003.safetensors" in hub.files(REPO)


def test_an_upload_cut_off_by_the_network_goes_on_by_itself(hub, checkpoint):
    hub.fail("PUT", "/large/", status=None)
    push_folder(checkpoint, REPO)
    assert {"README.md", "model-00001-of-00003.safetensors"} <= hub.files(REPO)


def test_publishing_again_with_other_shards_removes_the_old_ones(hub, checkpoint, tmp_path):
    push_folder(checkpoint, REPO)
    whole = convert(checkpoint, tmp_path / "whole")
    push_folder(whole, REPO)
    weights = {name for name in hub.files(REPO) if "safetensors" in name}
    assert weights == {"model.safetensors"}


def test_a_revision_is_published_beside_main(hub, checkpoint):
    push_folder(checkpoint, REPO, revision="v2")
    assert hub.files(REPO) == {".gitattributes"}
    assert "model.safetensors.index.json" in hub.files(REPO, "v2")
    assert 'revision="v2"' in (checkpoint / "README.md").read_text()


def test_a_private_repository_is_created_private(hub, checkpoint):
    push_folder(checkpoint, REPO, private=True)
    assert hub.repositories[REPO].private


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "generation_loop.py",
        "model-00002-of-00003.safetensors",
        "processor_config.json",
    ],
)
def test_an_incomplete_folder_is_refused_before_anything_is_sent(hub, checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        push_folder(checkpoint, REPO)
    assert not hub.requests


def test_a_config_that_auto_model_cannot_use_is_refused(hub, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="auto_map entry for AutoModel"):
        push_folder(checkpoint, REPO)


def test_the_cards_header_says_what_the_hub_reads(checkpoint):
    provenance = Provenance("MSALab/PerceptionDLM", "0" * 40, "python convert_checkpoint.py")
    card = ModelCard(model_card(checkpoint, REPO, provenance=provenance, report=REPORT))
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == "MSALab/PerceptionDLM"
    assert data["license"] == "apache-2.0"
    assert "custom_code" in data["tags"]


def test_a_reports_scores_become_a_model_index(checkpoint):
    header = yaml.safe_load(model_card(checkpoint, REPO, report=REPORT).split("---")[1])
    (entry,) = header["model-index"]
    (result,) = entry["results"]
    assert result["dataset"] == {"type": "MSALab/ParaDLC-Bench", "name": "ParaDLC-Bench"}
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert values == {
        "Average": 62.4,
        "Positive questions": 50.0,
        "Negative questions": 74.8,
        "Tokens per forward, padding counted": 2.9,
    }


def test_what_was_measured_on_scenes_stands_on_the_card_where_no_benchmark_was_scored(checkpoint):
    measured = {"scenes": 500, "name_accuracy": 0.625, "question_accuracy": 0.5}
    report = {"summary": None, "measurements": measured}
    card = model_card(checkpoint, REPO, report=report)
    assert "500 synthetic scenes, shares in per cent." in card
    (entry,) = yaml.safe_load(card.split("---")[1])["model-index"]
    values = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert values == {"Names": 62.5, "Questions about images": 50.0}
    with pytest.raises(ValueError, match="expected a report with a summary or measurements"):
        model_card(checkpoint, REPO, report={"summary": None})


def test_the_card_lists_the_checksums_that_sha256sum_gives(checkpoint):
    lines = subprocess.run(
        ["sha256sum", *sorted(checkpoint.glob("*.safetensors"))], capture_output=True, text=True
    ).stdout.splitlines()
    assert list(checksums(checkpoint).values()) == [line.split()[0] for line in lines]
    card = model_card(checkpoint, REPO)
    assert all(digest in card for digest in checksums(checkpoint).values())


def test_provenance_names_a_hub_snapshots_commit_and_no_local_folder(checkpoint, tmp_path):
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    argv = ["convert_checkpoint.py", "--source", "MSALab/P", "--output", str(tmp_path / "made")]
    write_provenance(checkpoint, "MSALab/P", snapshot, argv)
    record = json.loads((checkpoint / "provenance.json").read_text())
    assert record["revision"] == "a" * 40
    assert record["command"] == "convert_checkpoint.py --source MSALab/P --output made"
    write_card(checkpoint, REPO)
    card = (checkpoint / "README.md").read_text()
    assert "a" * 40 in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("name", ["README.md", "provenance.json"])
def test_a_card_or_provenance_that_cannot_be_written_leaves_the_old_one(
    checkpoint, monkeypatch, name
):
    def write(source: str):
        write_provenance(checkpoint, source, checkpoint, ["convert"])
        write_card(checkpoint, source)

    write("owner/old")
    before = (checkpoint / name).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write("owner/new")
    assert (checkpoint / name).read_bytes() == before and b"owner/old" in before


def test_a_card_of_ones_own_is_kept(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    push_folder(checkpoint, REPO)
    assert (checkpoint / "README.md").read_text().endswith("mine\n")


def test_the_publish_command_prints_the_commit(hub, checkpoint, capsys):
    assert main(["publish", str(checkpoint), REPO, "--private"]) == 0
    assert f"{hub.url}/{REPO}/commit/" in capsys.readouterr().out


def test_how_to_go_on_names_the_options_given(hub, checkpoint, tmp_path, capsys):
    hub.fail("PUT", "/large/")
    report = tmp_path / "a report.json"
    report.write_text('{"summary": {}}')
    options = [
        "--private",
        "--revision",
        "draft",
        "--report",
        str(report),
        "--base-model",
        "a/b",
        "--base-model",
        "c/d",
    ]
    assert main(["publish", str(checkpoint), REPO, *options]) == 1
    command = shlex.join(["perceptiondlm", "publish", str(checkpoint), REPO, *options])
    assert f"to go on: {command}\n" in capsys.readouterr().err


def test_the_publish_command_says_how_to_go_on_after_a_failure(hub, checkpoint, capsys):
    hub.fail("PUT", "/large/", after=1)
    assert main(["publish", str(checkpoint), REPO]) == 1
    assert f"perceptiondlm publish {checkpoint} {REPO}" in capsys.readouterr().err


def test_the_converter_publishes_what_it_made(hub, tmp_path, capsys):
    source, output = VECTORS / "released-region", tmp_path / "made"
    arguments = ["--source", str(source), "--output", str(output), "--push-to-hub", REPO]
    assert convert_checkpoint.main([*arguments, "--private"]) == 0
    assert hub.repositories[REPO].private
    assert f"{REPO}/commit/" in capsys.readouterr().out
    card = hub.read(REPO, "README.md")
    assert "Made from `released-region`." in card
    assert f"--source released-region --output made --push-to-hub {REPO} --private" in card
    assert str(tmp_path) not in card


def test_a_conversion_that_cannot_be_published_is_kept_and_says_so(hub, tmp_path, capsys):
    hub.fail("POST", "/commit/")
    arguments = ["--source", str(VECTORS / "released-region"), "--output", str(tmp_path / "made")]
    assert convert_checkpoint.main([*arguments, "--push-to-hub", REPO]) == 12
    assert (tmp_path / "made" / "model.safetensors").exists()
    assert main(["publish", str(tmp_path / "made"), REPO]) == 0


def test_a_bad_repository_name_ends_the_converter_before_it_starts(tmp_path):
    arguments = ["--source", str(VECTORS / "released-region"), "--output", str(tmp_path / "made")]
    with pytest.raises(SystemExit):
        convert_checkpoint.main([*arguments, "--push-to-hub", "captioner"])
    assert not (tmp_path / "made").exists()


def report_of(folder, dtype: str = "float32", **runs) -> dict:
    """A report as `evaluate report` writes it, with the fingerprint that evaluation records."""
    model, _ = load_model(str(folder), "", dtype, "cpu")
    run = {"model": "measured", "dtype": dtype, "weights": weights_fingerprint(model)}
    return REPORT | {"prediction_run": REPORT["prediction_run"] | run, "measurements": run} | runs


@pytest.fixture(scope="module")
def others(sharded, tmp_path_factory):
    """Another model of the same shape: one value of one tensor differs."""
    folder = Path(shutil.copytree(sharded, tmp_path_factory.mktemp("others") / "checkpoint"))
    shard = folder / "model-00003-of-00003.safetensors"
    weights = load_file(shard)
    next(iter(weights.values())).flatten()[0] += 1
    save_file(weights, shard, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_report_of_the_folders_own_weights_goes_on_the_card(hub, checkpoint, dtype):
    push_folder(checkpoint, REPO, report=report_of(checkpoint, dtype))
    assert "62.4" in hub.read(REPO, "README.md")


@pytest.mark.parametrize("run", ["prediction_run", "measurements"])
def test_a_report_of_other_weights_is_refused_and_both_are_named(hub, checkpoint, others, run):
    own, other = report_of(checkpoint), report_of(others)
    fingerprints = [report["prediction_run"]["weights"] for report in (own, other)]
    named = re.escape(f"({fingerprints[0]}), got one of measured ({fingerprints[1]})")
    with pytest.raises(ValueError, match=named):
        push_folder(checkpoint, REPO, report=own | {run: other[run]})
    assert not hub.requests and not (checkpoint / "README.md").exists()


def test_the_publish_command_refuses_a_report_of_other_weights(
    hub, checkpoint, others, tmp_path, capsys
):
    (tmp_path / "report.json").write_text(json.dumps(report_of(others)))
    options = ["--report", str(tmp_path / "report.json")]
    assert main(["publish", str(checkpoint), REPO, *options]) == 2
    assert "expected a report of the weights in" in capsys.readouterr().err


def test_the_embedded_models_own_report_is_its_own():
    report = json.loads((ROOT / "evaluation" / "examples" / "report.json").read_text())
    expect_report_of(ROOT / "tiny", report)


def test_a_report_that_names_no_weights_is_published_with_a_warning(hub, checkpoint, caplog):
    push_folder(checkpoint, REPO, report=REPORT)
    assert "does not say which weights it is of" in caplog.text


def test_a_report_beside_a_card_of_ones_own_is_refused(hub, checkpoint):
    (checkpoint / "README.md").write_text("mine\n")
    with pytest.raises(ValueError, match="no report for a card of one's own"):
        push_folder(checkpoint, REPO, report=report_of(checkpoint))


@pytest.mark.parametrize("offline", [False, True])
def test_publishing_out_of_the_hubs_reach_ends_in_a_line_and_how_to_go_on(
    checkpoint, monkeypatch, capsys, offline
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["publish", str(checkpoint), REPO]) == 1
    error, retry = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: ") and retry.startswith("to go on: perceptiondlm publish")


@pytest.mark.parametrize("repo_id", ["captioner", "../x", "a/b/c"])
def test_a_repository_without_an_owner_is_refused(hub, checkpoint, repo_id):
    with pytest.raises(ValueError, match="owner/name"):
        push_folder(checkpoint, repo_id)
