"""The plugins for lmms-eval (if it is installed) and VLMEvalKit (its base class played)."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures" / "lmms_eval"


@pytest.fixture
def pair(make):
    return make(region_layout="independent", roi_convention="aligned")


# ---------------------------------------------------------------------------- lmms-eval


@pytest.fixture
def lmms_model(pair, monkeypatch):
    pytest.importorskip("lmms_eval")
    from perceptiondlm.evaluation import lmms_eval_plugin as plugin

    monkeypatch.setattr(plugin, "load_model", lambda *given, **named: pair)

    def build(**options):
        model = plugin.PerceptionDLMForLMMSEval("path", likelihood_samples=4, **options)
        model.task_dict = {"task": {"test": {i: {"seed": i} for i in range(4)}}}
        return model

    return build


@pytest.fixture
def visual(draw_image):
    return lambda doc: [draw_image(40 + 8 * doc["seed"], 30, doc["seed"])]


def requests(kind: str, visual, second, count: int = 3) -> list:
    contexts = ["What is it?", "How many objects are there?", "Is it red?"]
    return [
        SimpleNamespace(args=(contexts[i], second, visual, i, "task", "test"), request_type=kind)
        for i in range(count)
    ]


def test_batched_answers_are_those_of_single_questions(lmms_model, visual):
    asked = requests("generate_until", visual, {"max_new_tokens": 4, "until": ["\n\n"]})
    batched = lmms_model(batch_size=3).generate_until(asked)
    single = lmms_model(batch_size=1).generate_until(asked)
    assert batched == single and len(batched) == 3


def test_likelihoods_are_losses_and_agree_with_greedy_decoding(lmms_model, visual):
    model = lmms_model(batch_size=4)
    asked = requests("loglikelihood", visual, " red")
    losses = [pair_of(found) for found in model.loglikelihood(asked)]
    bounds = [pair_of(found) for found in lmms_model(return_loss=False).loglikelihood(asked)]
    assert all(loss > 0 and not greedy for loss, greedy in losses)
    assert [-bound for bound, _ in bounds] == pytest.approx([loss for loss, _ in losses], rel=1e-5)


def test_a_continuation_that_decoding_gives_is_greedy(lmms_model, visual):
    model = lmms_model(answer_length=3)
    eot = model.model.config.eot_token_id
    question = requests("generate_until", visual, {}, 1)[0].args[0]
    inputs = model.processor([visual({"seed": 0})], prompts=[question], max_new_tokens=3)
    decoded = model.model.diffusion_generate(inputs=dict(inputs), processor=model.processor)
    ids = decoded.token_ids[0][0]
    model.processor = TargetProcessor(model.processor, ids)
    greedy = model._is_greedy(question, "a", visual({"seed": 0}))
    assert greedy
    model.processor.ids = [*ids[:-1], eot if ids[-1] != eot else ids[0] + 1]
    greedy = model._is_greedy(question, "a", visual({"seed": 0}))
    assert not greedy


class TargetProcessor:
    """Puts given ids where the answer's are."""

    def __init__(self, processor, ids):
        self.processor, self.ids = processor, ids

    def __call__(self, *args, **options):
        inputs = self.processor(*args, **options)
        inputs["labels"][inputs["labels"] != -100] = torch.tensor(self.ids)
        return inputs

    def __getattr__(self, name):
        return getattr(self.processor, name)


def pair_of(found) -> tuple:
    """What lmms-eval makes of a response."""
    from lmms_eval.api.instance import unwrap_generation_output

    return unwrap_generation_output(found)[0]


def test_short_answers_are_padded_and_long_ones_are_not(lmms_model):
    model = lmms_model(answer_length=3)
    length = len(model.processor.tokenizer("anything", add_special_tokens=False)["input_ids"])
    assert length > 3
    for text, expected in (("a", 3), ("anything", length + 1)):
        answer = model._masked_answer("What?", text, [])[1]
        assert len(answer) == expected


def test_a_tasks_arguments_become_options(lmms_model):
    model = lmms_model(block_length=4)
    options, until = model.decoding_options(
        {"max_new_tokens": 10, "temperature": 0.5, "top_p": None, "until": "\n", "num_beams": 1}
    )
    assert options == {"max_new_tokens": 12, "temperature": 0.5, "block_length": 4}
    assert until == ["\n"]
    assert lmms_model(max_new_tokens=8).decoding_options({"max_new_tokens": 10})[0] == {
        "max_new_tokens": 8
    }


def test_answers_end_where_a_task_says(lmms_model):
    from perceptiondlm.evaluation.lmms_eval_plugin import cut_at

    assert cut_at("red star\nblue", ["\n", "star"]) == "red"
    assert cut_at("red", ["\n"]) == "red"


def test_unknown_options_and_videos_are_refused(lmms_model):
    with pytest.raises(ValueError, match=r"got \['stepz'\]"):
        lmms_model(stepz=3)
    asked = requests("generate_until", lambda doc: ["film.mp4"], {}, 1)
    with pytest.raises(ValueError, match="expected images for task, document 0, got str"):
        lmms_model().generate_until(asked)


def test_lmms_eval_finds_the_model_and_the_local_tasks():
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks import TaskManager
    from perceptiondlm.evaluation.lmms_eval_plugin import manifest

    found = manifest()
    assert found.model_id == "perceptiondlm"
    assert found.simple_class_path.endswith("lmms_eval_plugin.PerceptionDLMForLMMSEval")
    tasks = TaskManager("WARNING", include_path=str(FIXTURES), include_defaults=False)
    assert {"scene_questions", "scene_choices"} <= set(tasks.all_tasks)


# ---------------------------------------------------------------------------- VLMEvalKit


class FakeBaseModel:
    """VLMEvalKit's interface as far as it is used: `generate` hands on a list of parts."""

    INTERLEAVE = False

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        assert all({"type", "value"} <= set(part) for part in message)
        return self.generate_inner(message, dataset)


@pytest.fixture
def adapter(monkeypatch, pair):
    """The adapter's module, imported with a played `vlmeval`."""
    base, config = ModuleType("vlmeval.vlm.base"), ModuleType("vlmeval.config")
    base.BaseModel, config.supported_VLM = FakeBaseModel, {}
    modules = {"vlmeval": ModuleType("vlmeval"), "vlmeval.vlm": ModuleType("vlmeval.vlm")}
    for name, module in (modules | {base.__name__: base, config.__name__: config}).items():
        monkeypatch.setitem(sys.modules, name, module)
    name = "perceptiondlm.evaluation.vlmevalkit_adapter"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = __import__(name, fromlist=["register"])
    monkeypatch.setattr(module, "load_model", lambda *given, **named: pair)
    yield module
    sys.modules.pop(name, None)


def test_a_message_is_answered_as_the_same_question(adapter, pair, draw_image):
    model, processor = pair
    shown = draw_image(50, 30)
    wrapped = adapter.PerceptionDLMForVLMEvalKit("path", device="cpu", max_new_tokens=4)
    message = [{"type": "image", "value": shown}, {"type": "text", "value": "What is it?"}]
    expected = model.diffusion_generate(
        images=shown, prompts="What is it?", processor=processor, max_new_tokens=4
    )
    assert wrapped.generate(message) == expected.texts[0][0]


def test_images_stand_where_the_message_has_them(adapter, pair, draw_image, monkeypatch):
    model, processor = pair
    seen = []
    monkeypatch.setattr(
        type(model),
        "diffusion_generate",
        lambda self, inputs, processor: seen.append(inputs) or SimpleNamespace(texts=[["x"]]),
    )
    wrapped = adapter.PerceptionDLMForVLMEvalKit("path", device="cpu")
    parts = ["First", draw_image(40, 30), "then", draw_image(30, 40, seed=1), "what?"]
    wrapped.generate(
        [{"type": "text" if isinstance(part, str) else "image", "value": part} for part in parts]
    )
    text = processor.tokenizer.decode(seen[0]["input_ids"][0])
    places = [text.index(word) for word in ("First", "<img>", "then", "what?")]
    assert places == sorted(places) and text.count("<img>") == 2


def test_checkpoints_are_registered_and_the_kits_script_runs(adapter, tmp_path, capsys):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\n"
        "model = supported_VLM['perceptiondlm']()\nprint(model.options, sys.argv[1:])\n"
    )
    adapter.main(["--checkpoint", "p", "--option", "steps=3", str(script), "--data", "MME"])
    assert capsys.readouterr().out == "{'steps': 3} ['--data', 'MME']\n"


def test_videos_are_refused(adapter):
    wrapped = adapter.PerceptionDLMForVLMEvalKit("path", device="cpu")
    with pytest.raises(ValueError, match="type image and text, got \\['video'\\]"):
        wrapped.generate([{"type": "video", "value": "film.mp4"}])
