"""Measures: chosen by name, one interface for the checker, CLIP and a user's own, and told before anything starts if one cannot be."""

import json
from importlib import metadata
from pathlib import Path

import pytest
from own_pictures import run_on, ten

from t2ilib.config import ConfigError
from t2ilib.evaluation import measures
from t2ilib.evaluation.measures import MEASURES, Context, Measure, find_measures, measure
from t2ilib.evaluation.metrics import DECLARATIONS, Metric, declare
from t2ilib.evaluation.rows import read_rows
from t2ilib.models.load import load_base
from t2ilib.report import load_report, markdown_table, summary_table
from t2ilib.runfile import build_run
from t2ilib.shapes import world

__all__ = ["ten"]
ROOT = Path(__file__).parents[2]
OWN = str(ROOT / "experiments" / "sharpness.py")
DRAWN = {"adapter": {}, "data": {"source": "shapes"}, "shapes": {"scenes": ["heart"], "checked_prompts": 2}}
SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1.0}


def run_of(*names: str, **sections) -> object:
    return build_run(DRAWN | {"evaluation": SETTINGS | {"measures": names or None}} | sections)


@pytest.fixture(scope="module")
def components():
    return load_base(build_run(DRAWN).model)


def test_without_names_all_that_apply_are_asked() -> None:
    assert list(find_measures(run_of())) == ["checker", "clip"]
    groups = {"evaluation": SETTINGS | {"prompt_groups": {"captions": ["a"], "unrelated": ["b"]}}}
    assert list(find_measures(run_of(**groups))) == ["checker", "clip", "likeness", "drift", "diversity", "memorising"]
    folder = {"data": {}, "shapes": None}
    assert list(find_measures(run_of(**folder))) == ["clip"]
    assert list(find_measures(run_of(**folder, model={"base": "owner/name"}))) == []
    unchecked = {"shapes": {"checked_prompts": 0}}
    assert list(find_measures(run_of(**unchecked))) == ["clip"]


@pytest.mark.parametrize(
    ("names", "sections", "message"),
    [
        (("chekcer",), {}, r"'chekcer' does not exist; choose from checker, clip, .*Did you mean 'checker'"),
        (
            ("checker",),
            {"data": {}, "shapes": None},
            r"checker cannot measure this run: it knows the drawn world alone",
        ),
        (("clip",), {"model": {"base": "owner/name"}}, r"clip cannot measure this run: set evaluation.clip_model"),
        (("nowhere.py:x",), {}, r"there is no Python file nowhere.py"),
        ((f"{OWN}:sharpnes",), {}, r"a Measure called 'sharpnes' does not exist.*Did you mean 'sharpness'"),
    ],
)
def test_what_cannot_be_asked_is_told(names, sections, message) -> None:
    with pytest.raises(ConfigError, match=message):
        find_measures(run_of(*names, **sections))


def test_training_asks_first(tmp_path: Path) -> None:
    from t2ilib.training.loop import train

    with pytest.raises(ConfigError, match="chekcer"):
        train(run_of("chekcer", output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_measure_of_ones_own_is_asked_logged_and_shown_like_the_others(components, tmp_path: Path) -> None:
    """The page of example itself: its numbers by hand, its declaration in the run's folder, its table in the report."""
    folder = tmp_path / "toy-quick" / "plain" / "seed0"
    folder.mkdir(parents=True)
    run = run_of("checker", f"{OWN}:sharpness", output=str(folder))
    declare(folder, {"steps_per_second": Metric("steps per second", "rate", table="Cost")})
    found = measure(run, components)
    assert {"sharpness/concept", "sharpness/base_kept", "concept/all"} <= found.keys()
    assert not [name for name in found if name.startswith("clip_score")], "CLIP was not asked for"
    about = json.loads((folder / DECLARATIONS).read_text())
    assert about["sharpness/base_kept"] == {"title": "sharpness, base kept", "better": "higher", "table": "Of our own"}
    assert list(about)[-1] == "steps_per_second", "what the pictures show comes before what it cost"
    result = {"variant": "plain", "seed": 0, "status": "finished", "run": {}, "metrics": found, "measures": about}
    (folder / "result.json").write_text(json.dumps(result))
    study = {"name": "toy", "reference": "plain", "seeds": [0], "variants": {"plain": {"title": "Plain"}}}
    (tmp_path / "toy-quick" / "study.json").write_text(json.dumps(study))
    report = load_report(tmp_path / "toy-quick")
    assert report.tables()["Of our own"] == ["sharpness/concept", "sharpness/base_kept"]
    table = markdown_table(summary_table(report, report.tables()["Of our own"]))
    assert f"{found['sharpness/concept']:.2f}" in table


def test_the_example_measures_what_it_says() -> None:
    from PIL import Image

    from t2ilib.evaluation.measures import find_measure

    flat = Image.new("RGB", (8, 8), "grey")
    half = flat.copy()
    half.paste("white", (4, 0, 8, 8))  # one step of 127 in each of eight rows, among seven neighbours
    context = Context("prompts", build_run(DRAWN), None)
    own = find_measure(f"{OWN}:sharpness").function
    assert own([flat], ["a"], context) == {"sharpness/prompts": [0.0]}
    assert own([half], ["a"], context)["sharpness/prompts"][0] == pytest.approx((127 / 7) / 2)


def test_a_package_can_offer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("mine", f"{__name__}:constant", "t2ilib.measures")
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints([entry]))
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: constant)
    assert find_measures(run_of("mine"))["mine"] is constant
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: 3)
    with pytest.raises(ConfigError, match="the entry point mine gives a int, not a Measure"):
        find_measures(run_of("mine"))


constant = Measure(lambda pictures, prompts, context: {"one": 1.0}, {"one": Metric("one")})


def test_what_a_measure_does_not_declare_is_an_error(components, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(MEASURES, "checker", Measure(lambda *_: {"two": 2.0}, {"one": Metric("one")}))
    with pytest.raises(ConfigError, match="the measure checker does not declare what it returned: two"):
        measure(run_of("checker", output=str(tmp_path)), components)
    assert not (tmp_path / "metrics.json").exists()


def test_pictures_are_drawn_once_for_all_measures(components, tmp_path: Path, monkeypatch) -> None:
    """Every measure gets the same pictures, the scenes where they are known, and one place to keep things."""
    seen = []

    def watch(pictures, prompts, context: Context) -> dict[str, float]:
        context.shared.setdefault("calls", []).append(context.group)
        seen.append((pictures, prompts, context))
        return {}

    drawn, draw = [], measures.draw
    monkeypatch.setattr(measures, "draw", lambda *a, **k: drawn.append(a) or draw(*a, **k))
    for name in ("checker", "clip"):
        monkeypatch.setitem(MEASURES, name, Measure(watch, {}))
    measure(run_of(output=str(tmp_path)), components)
    assert len(drawn) == 2
    assert [context.group for _, _, context in seen] == ["concept"] * 2 + ["base_kept"] * 2
    assert seen[0][0] is seen[1][0]
    assert seen[0][1] == [world.caption(scene) for scene in seen[0][2].scenes]
    assert seen[-1][2].shared["calls"] == ["concept", "concept", "base_kept", "base_kept"]


def test_without_prompts_those_of_the_training_are_drawn_and_scored(components, tmp_path: Path) -> None:
    """A run on pictures of one's own; the drawn world has test prompts, and a run's own prompts come first."""
    own = {"data": {}, "shapes": None, "output": str(tmp_path)}
    captions = [f"a red circle number {number}" for number in range(9)]
    found = measure(run_of(**own), components, prompts=captions)
    assert [name for name in found if not name.startswith(("peak_", "memory/", "drawing/"))] == ["clip_score/prompts"]
    assert json.loads((tmp_path / "pictures" / "prompts.json").read_text()) == captions[:8]
    about = json.loads((tmp_path / DECLARATIONS).read_text())["clip_score/prompts"]
    assert about == {"title": "CLIP score", "better": "higher", "table": "Learned and kept", "role": "followed"}
    named = run_of(**own, evaluation=SETTINGS | {"prompts": ["a blue square"]})
    measure(named, components, prompts=captions)
    assert json.loads((tmp_path / "pictures" / "prompts.json").read_text()) == ["a blue square"]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1, "pictures of other prompts are left"
    assert measures.prompt_groups(run_of(), captions).keys() == {"concept", "base_kept"}
    assert measures.prompt_groups(run_of(shapes={"checked_prompts": 0}), captions) == {}


def test_groups_of_prompts_are_drawn_and_judged_on_ten_pictures_of_ones_own(components, ten, caplog) -> None:
    """The untouched base: it learned nothing and kept everything, and its rows say so of every picture."""
    from t2ilib.data.dataset import load_datasets

    run = run_on(ten, adapter=None, training={"trains": "nothing", "steps": 0})
    training, held_out = load_datasets(run)
    asked = {
        "captions": [*held_out.captions(), *training.captions()[:2]],
        "contexts": ["a heart", "a small heart"],
        "unrelated": ["a red circle", "a blue square"],
    }
    run = run_on(ten, adapter=None, training={"trains": "nothing", "steps": 0}, evaluation={"prompt_groups": asked})
    found = measure(run, components, prompts=["not drawn"])
    assert found["learned/clip-patches"] == pytest.approx(0, abs=1e-9)
    assert found["kept/clip-patches"] == pytest.approx(1)
    assert found["drift/pixels"] == 0
    assert {
        "clip_score/captions",
        "clip_score/contexts",
        "likeness/contexts/clip-patches",
        "diversity/captions/clip-patches",
    } <= found.keys()
    assert "clip_score/prompts" not in found
    about = json.loads((run.output / DECLARATIONS).read_text())
    roles: dict[str, list[str]] = {}
    for name, metric in about.items():
        roles.setdefault(metric.get("role"), []).append(name)
    assert {role: roles[role][0] for role in ("learned", "kept", "followed")} == {
        "learned": "learned/clip-patches", "kept": "kept/clip-patches", "followed": "clip_score/contexts"
    }  # fmt: skip
    rows = list(read_rows(run.output))
    assert [row.prompt for row in rows if "learned/clip-patches" in row.values] == held_out.captions()
    assert [row.values["kept/clip-patches"] for row in rows if row.group == "unrelated"] == pytest.approx([1, 1])
    drawn = json.loads((run.output / "pictures" / "prompts.json").read_text())
    assert set(drawn) <= {prompt for prompts in asked.values() for prompt in prompts}
    none = {"path": str(ten), "validation_share": 0.0}
    measure(run.model_copy(update={"data": run_on(ten, data=none).data}), components)
    assert "likeness is not measured: no pictures are held out: set data.validation_share" in caplog.text


def test_what_lies_above_its_ceiling_is_warned_of(components, tmp_path: Path, monkeypatch, caplog) -> None:
    high = Metric("copies", "share", ceiling="{group}/most", flag="learned by heart")
    declared = {"{group}/copies": high, "{group}/most": Metric("most", table=None)}
    told = Measure(
        lambda pictures, prompts, context: {f"{context.group}/copies": 0.75, f"{context.group}/most": 0.5}, declared
    )
    monkeypatch.setitem(MEASURES, "checker", told)
    measure(run_of("checker", output=str(tmp_path)), components)
    assert "copies: 0.75, and at most 0.5 is usual: learned by heart" in caplog.text
    about = json.loads((tmp_path / DECLARATIONS).read_text())
    assert about["concept/copies"]["ceiling"] == "concept/most"


@pytest.mark.parametrize("wrong", [{"unit": "percent"}, {"better": "up"}, {"role": "learnt"}])
def test_a_declaration_that_no_report_could_read_is_refused_at_once(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=r"metric 'x': \w+ .* does not exist; choose from"):
        Metric("x", **wrong)
