"""What `pip install .` brings, and that it works from any folder."""

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clean_rooms import write_hub_cache
from hub_server import TOKEN, HubServer
from packaging.version import Version
from perceptiondlm.apps.captioning.captioner import RegionCaptioner

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "fixtures" / "vectors"
TOO_LARGE = 10_000_000  # bytes; the Hub takes a larger file only through LFS
LISTING = """
import json
from setuptools.dist import Distribution

distribution = Distribution()
distribution.script_name = "setup.py"
distribution.parse_config_files()
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
print(json.dumps(build.get_outputs(include_bytecode=0)))
"""
NOT_INSTALLED = {"tests", "docs", "examples", ".ci", ".github"}


def tracked() -> list[str]:
    """The repository's files; the test is skipped where it is no git clone."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git clone")
    return [line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_is_larger_than_the_hub_takes_in_plain_git():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked()}
    assert {name: size for name, size in sizes.items() if size >= TOO_LARGE} == {}


@pytest.fixture(scope="module")
def installed():
    """Paths inside the package that setuptools would install, without building anything."""
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run([sys.executable, "-c", LISTING], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    paths = [Path(path) for path in json.loads(done.stdout.splitlines()[-1])]
    return {str(Path(*path.parts[path.parts.index("perceptiondlm") + 1 :])) for path in paths}


def test_every_module_is_installed(installed):
    modules = {n for n in tracked() if n.endswith(".py") and n.split("/")[0] not in NOT_INSTALLED}
    assert modules <= installed


@pytest.mark.parametrize(
    "pattern",
    ["LICENSE", "py.typed", "config.json", "tiny/*", "configs/**/*.yaml", "apps/space/*",
     "apps/web/*.js", "apps/web/*.css", "apps/web/*.html", "scenes/*.json", "scenes/examples/*"],
)  # fmt: skip
def test_what_runs_read_beside_the_modules_is_installed(installed, pattern):
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}
    assert found and found <= installed


def test_each_named_version_is_the_one_that_is_required():
    """pyproject.toml, the floors that are tested, the Space, the card and the import agree."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + extras["train"] + extras["eval"] + extras["dev"]
    floors = dict(line.split(",")[0].split(">=") for line in asked)
    lines = (ROOT / "requirements-floors.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    for name in floors.keys() - {"mypy", "ruff", "httpx"}:  # these run no test of the core
        assert Version(pins[name]) == Version(floors[name]), name
    space = (ROOT / "apps" / "space" / "requirements.txt").read_text().splitlines()
    assert set(project["dependencies"]) <= set(space)
    newest = floors["transformers"]
    for file in ("publishing/card.py", "configuration_perceptiondlm.py"):
        assert f"transformers>={newest}" in (ROOT / file).read_text()
    assert f"transformers {newest} or later" in (ROOT / "README.md").read_text()


SNAPSHOT = """
import runpy, sys
from pathlib import Path
import perceptiondlm
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.training.recipe import load_recipe

RegionCaptioner.from_pretrained()
load_recipe("configs/shapes.yaml")
package = Path(perceptiondlm.__path__[0])
sys.argv = ["assemble", "space"]
runpy.run_path(str(package / "apps" / "space" / "assemble.py"), run_name="__main__")
"""


@pytest.mark.slow
def test_a_hub_snapshot_of_the_repository_finds_what_lies_beside_its_modules(tmp_path):
    """Its files are links into `blobs/`; the package is the folder of the links."""
    repository = tmp_path / "repository"
    for name in tracked():
        if name.split("/")[0] not in NOT_INSTALLED:
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_bytes((ROOT / name).read_bytes())
    snapshot = write_hub_cache(repository, tmp_path / "home", "somebody/code")
    (tmp_path / "perceptiondlm").symlink_to(snapshot)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package = tmp_path / "space" / "perceptiondlm"
    assert (package / "tiny" / "config.json").is_file() and (package / "LICENSE").is_file()
    assert not any(path.is_symlink() for path in package.rglob("*"))


def imported_files(file: Path) -> set[Path]:
    """Modules of this package that a module imports, read from its text."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            folder = file.parents[node.level - 1]
        elif node.module.startswith("perceptiondlm."):
            folder = file.parents[2]  # from apps/space
        else:
            continue
        parts = (node.module or "").removeprefix("perceptiondlm.").split(".")
        module = folder.joinpath(*filter(None, parts))
        if module.is_dir():
            found |= {module / f"{name.name}.py" for name in node.names}
        else:
            found.add(module.with_suffix(".py"))
    return found


def test_a_space_holds_every_module_that_its_page_imports(tmp_path):
    assemble = runpy.run_path(str(ROOT / "apps" / "space" / "assemble.py"))["assemble"]
    assemble(tmp_path / "space")
    package = tmp_path / "space" / "perceptiondlm"
    needed, new = set(), imported_files(ROOT / "apps" / "space" / "app.py")
    while new:
        needed |= new
        new = {n for file in new if file.exists() for n in imported_files(file)} - needed
    names = {str(file.relative_to(ROOT)) for file in needed if file.is_file()}
    assert {"apps/web/page.py", "scenes/shapes.py"} <= names  # the walk went that far
    assert {name for name in names if not (package / name).is_file()} == set()
    for asset in ROOT.glob("apps/web/*.*s"):  # its script and style
        assert (package / asset.relative_to(ROOT)).is_file()


def test_the_forges_workflow_runs_ci_and_the_floors():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    commands = {name: [step.get("run") for step in job["steps"]]
                for name, job in workflow["jobs"].items()}  # fmt: skip
    assert "bash .ci/run" in commands["tests"] and "make test-floors" in commands["floors"]
    assert "\ntest-floors:" in (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Runs a command of the installed wheel in a folder of its own."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(home), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = home.glob("*.whl")
    site = home / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)

    def run(module: str, *arguments: str, **variables: str) -> str:
        own = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
        done = subprocess.run(
            [sys.executable, "-m", f"perceptiondlm.{module}", *arguments],
            cwd=home,
            env={**os.environ, **own, **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run.home, run.site = home, site
    return run


@pytest.mark.slow
def test_an_installed_wheel_captions_with_the_embedded_model(elsewhere):
    image = str(VECTORS / "region_0.png")
    printed = elsewhere("apps.cli", "caption", image, "--box", "5,5,60,60", "--format", "json")
    expected = RegionCaptioner.from_pretrained()(image, [{"box": [5, 5, 60, 60]}]).captions
    assert [region["caption"] for region in json.loads(printed)[0]["regions"]] == expected


@pytest.mark.slow
def test_an_installed_wheel_trains_by_its_own_recipes(elsewhere):
    elsewhere(
        "apps.cli", "train", "configs/shapes.yaml", "trainer.max_steps=1", "data.scenes=16",
        "data.scene_sets=1", "trainer.bf16=false", "trainer.use_cpu=true",
        "trainer.per_device_train_batch_size=2", "trainer.lr_scheduler_type=constant",
        "trainer.lr_scheduler_kwargs={}", "trainer.warmup_steps=0",
        "model.tokenizer_scenes=20",
    )  # fmt: skip
    assert (elsewhere.home / "runs" / "shapes" / "config.json").is_file()


@pytest.mark.slow
def test_what_an_installed_wheel_converts_can_be_published(elsewhere):
    tiny = str(elsewhere.site / "perceptiondlm" / "tiny")
    elsewhere("convert_checkpoint", "--source", tiny, "--output", "made", "--verify")
    with HubServer() as hub:
        reached = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        reached["HF_HUB_DISABLE_XET"] = "1"
        elsewhere("apps.cli", "publish", "made", "somebody/tiny", **reached)
        assert {"LICENSE", "modeling_perceptiondlm.py", "README.md"} <= hub.files("somebody/tiny")


@pytest.mark.slow
def test_an_installed_wheel_makes_a_space(elsewhere):
    elsewhere("apps.space.assemble", "space")
    pytest.importorskip("gradio")
    app = (elsewhere.home / "space" / "app.py").read_text()
    program = app.partition("model = ")[0] + "RegionCaptioner.from_pretrained()"
    environment = os.environ | {"PYTHONPATH": str(elsewhere.home / "space")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
