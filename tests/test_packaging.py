"""What a newcomer relies on: one source of truth for dependencies, README commands that exist, a fast command line."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from t2ilib.cli import app
from t2ilib.data.captions import build_captions
from t2ilib.presets import PRESETS
from t2ilib.runfile import build_run
from t2ilib.studies.file import load_study
from t2ilib.studies.notebooks import SHIPPED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    path: path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "experiments").glob("*.md")),
        ROOT / "inference" / "README.md",
        *sorted((ROOT / "results").glob("*.md")),
    )
    if path.name != "LOG.md"
}
"""What a person reads; the log says what was."""
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~\[ ;]", requirement)[0].lower().replace("_", "-")


def test_environment_yml_installs_the_project_and_nothing_else() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, last = environment["dependencies"]
    assert {name_of(item) for item in conda} == {"python", "pip"}
    python = next(item for item in conda if item.startswith("python")).split("=")[1]
    assert tuple(map(int, python.split("."))) >= tuple(
        map(int, PROJECT["requires-python"].removeprefix(">=").split("."))
    )
    assert last == {"pip": ["-c constraints.txt", "-e .[dev]"]}


def test_every_dependency_is_pinned_in_constraints() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.\-]+==[\w.]+", pin) for pin in pins)
    extras = PROJECT["optional-dependencies"]
    wanted = {name_of(item) for group in (PROJECT["dependencies"], *extras.values()) for item in group} - {"t2ilib"}
    assert f"t2ilib[{','.join(name for name in extras if name != 'dev')}]" in extras["dev"], "what tests need"
    assert wanted <= {name_of(pin) for pin in pins}


def test_the_notebooks_of_studies_and_settings_of_cards_are_in_the_wheel_and_in_the_source_archive() -> None:
    targets = PYPROJECT["tool"]["hatch"]["build"]["targets"]
    packed = targets["wheel"]["force-include"]
    cards = {f"t2ilib/cards/{name}.yaml": f"experiments/cards/{name}.yaml" for name in PRESETS}
    assert {target: source for source, target in packed.items()} == cards | {
        f"t2ilib/notebooks/{name}": f"experiments/{name}" for name in SHIPPED
    }
    assert {path.stem for path in (ROOT / "experiments" / "cards").iterdir()} == set(PRESETS)
    assert all((ROOT / source).is_file() for source in packed)
    assert "experiments" in targets["sdist"]["include"], "a wheel is built from there too"


def test_ci_calls_the_readme_test_command() -> None:
    assert "make test" in README
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def bash_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", "".join(PAGES.values()), re.DOTALL)
    return [
        line.rpartition("| ")[2] for block in blocks for line in block.splitlines() if line and not line.startswith("#")
    ]


@pytest.mark.parametrize("command", bash_commands())
def test_readme_command_exists_with_its_options(command: str) -> None:
    words = command.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[0] == "source":
        assert words[1] in (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv"), "as the install says"
        return
    assert words[0] == "t2ilib"
    depth = 3 if words[1] in ("study", "data", "tiny", "results") else 2
    text = CliRunner().invoke(app, [*words[1:depth], "--help"], env={"COLUMNS": "400"}).output
    for option in re.findall(r"--[a-z-]+", command):
        assert option in text, f"{option} is not an option of {' '.join(words[:depth])}"
    for path in re.findall(r"experiments/\S+\.yaml", command):
        assert (ROOT / path).exists()


BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def runs_on_pages() -> list[str]:
    return [block for block in BLOCKS if "hypothesis:" not in block and "search:" not in block]  # which are a study's


@pytest.mark.parametrize("block", [block for block in BLOCKS if "search:" in block])
def test_searches_on_the_pages_are_those_of_a_study(block: str, tmp_path: Path) -> None:
    study = {"name": "page", "question": "?", "reference": "lora", "variants": {"lora": {"title": "LoRA"}}}
    study |= {"presets": {"full": {"seeds": [0]}}, "run": {"adapter": {}}}
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(study) + block)
    assert load_study(tmp_path / "page.yaml").search_of("full", "lora")


@pytest.mark.parametrize("block", runs_on_pages())
def test_sections_on_the_pages_make_runs(block: str) -> None:
    run = build_run({"adapter": {}, "training": {"batch_size": 4}, **yaml.safe_load(block)})
    said = build_captions(run.data.captions).specs or run.prior or run.student or run.evaluation.prompt_groups
    said = said or run.objective.method != "denoising" or run.adapter.tokens
    assert said or run.output.name == "cat"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_bare_make_lists_the_targets() -> None:
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "install"):
        assert f"make {target} " in listed


def test_the_numbers_at_the_top_of_the_readme_are_the_reports() -> None:
    report = (ROOT / "results" / "concepts-full" / "report.md").read_text()
    told = re.findall(
        r"^\| (\w[\w ]+) \| ([\d.]+ %) \| ([\d.± ]+%) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert [name for name, *_ in told] == [
        "heart shown",
        "striped shown",
        "blueprint shown",
        "concept learned",
        "base kept",
    ]
    for name, base, lora in told:
        table = next(
            part
            for part in report.split("###")
            if re.search(rf"\| {name} \|", part.splitlines()[2:3][0] if len(part.splitlines()) > 2 else "")
        )
        header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
        column = [cell.strip() for cell in header.split("|")].index(name)
        values = [[cell.strip() for cell in row.split("|")] for row in rows]
        assert [row[column] for row in values if row[2] in ("base", "lora")] == [base, lora], name
