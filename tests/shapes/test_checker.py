"""The checker believes no picture that only looks like an answer: blank, noisy, half-filled or shuffled ones."""

import numpy as np
import pytest
from PIL import Image

from t2ilib.evaluation.measures import MEASURES
from t2ilib.evaluation.rows import split
from t2ilib.runfile import build_run
from t2ilib.shapes import checker, world
from t2ilib.shapes.checker import ATTRIBUTES, UNREADABLE, checked, checked_scenes, judge, read
from t2ilib.shapes.world import (
    BLUEPRINT_PAPER,
    COLORS,
    CONCEPTS,
    Scene,
    all_scenes,
    mixed_scenes,
    render,
    sample_scenes,
)

CIRCLE = Scene("circle", "red", "large", "center", "white", "")


def pixels_of(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene, 0)).copy()


@pytest.mark.parametrize("color", [(245, 245, 245), (20, 20, 20), (128, 128, 128), (255, 0, 255), BLUEPRINT_PAPER])
def test_nothing_is_read_on_a_blank_sheet(color) -> None:
    assert set(read(Image.new("RGB", (64, 64), color)).values()) == {UNREADABLE}


def test_a_ruled_sheet_without_an_object_is_no_blueprint() -> None:
    sheet = pixels_of(sample_scenes(1, "test", 0, "blueprint")[0])
    away = np.linalg.norm(sheet - np.array(BLUEPRINT_PAPER, float), axis=-1) > 60
    sheet[away] = BLUEPRINT_PAPER
    assert set(read(Image.fromarray(sheet)).values()) == {UNREADABLE}


def test_dark_blue_paper_alone_makes_no_blueprint() -> None:
    """An object on a plain sheet of that colour: the style is told by the ruling, not by the border's colour."""
    picture = pixels_of(CIRCLE)
    white = np.linalg.norm(picture - np.array([245.0, 245, 245]), axis=-1) < 60
    picture[white] = BLUEPRINT_PAPER
    reading = read(Image.fromarray(picture))
    assert reading["style"] == UNREADABLE
    assert (reading["shape"], reading["color"]) == ("circle", "red")


@pytest.mark.parametrize("part", ["lower half", "upper half", "one band", "columns", "noise", "checkerboard"])
def test_what_is_partly_black_is_not_striped(part) -> None:
    picture = pixels_of(CIRCLE)
    inside = picture[..., 1] < 150
    rows, columns = np.indices((64, 64))
    black = {
        "lower half": rows >= 32,
        "upper half": rows < 32,
        "one band": (rows >= 30) & (rows < 34),
        "columns": columns % 8 >= 4,
        "noise": np.random.default_rng(0).random((64, 64)) < 0.5,
        "checkerboard": (rows // 4 + columns // 4) % 2 == 0,
    }[part]
    picture[inside & black] = (20, 20, 20)
    assert read(Image.fromarray(picture))["fill"] == "solid"


@pytest.mark.parametrize("concept", [None, *CONCEPTS])
def test_every_kind_of_scene_is_read(concept) -> None:
    scenes = all_scenes(concept)[::29]
    wrong = [scene for seed, scene in enumerate(scenes) if not all(judge(scene, read(render(scene, seed))).values())]
    assert not wrong


def means(group: str, scenes, pictures) -> dict[str, float]:
    return split(checked(group, scenes, pictures), 0, group, [world.caption(scene) for scene in scenes])[0]


def drawn(scenes, seed: int = 0) -> list[Image.Image]:
    return [render(scene, seed + index) for index, scene in enumerate(scenes)]


def test_learned_is_the_concept_and_all_else_and_stands_beside_what_would_be_had_for_nothing() -> None:
    run = build_run(
        {"adapter": {}, "data": {"source": "shapes"}, "shapes": {"scenes": list(CONCEPTS), "checked_prompts": 30}}
    )
    scenes = checked_scenes(run)["concept"]
    right = means("concept", scenes, drawn(scenes))
    assert right["concept/all"] == right["concept/shown"] == 1
    assert right["concept/chance"] == pytest.approx(1 / 30)
    assert right["concept/constant"] == pytest.approx(1 / 30)
    assert {right[f"concept/{name}"] for name in CONCEPTS} == {1}

    rng = np.random.default_rng(1)
    shuffled = means("concept", scenes, [drawn(scenes)[i] for i in np.roll(np.arange(30), 1)])
    assert shuffled["concept/all"] <= 1 / 30
    assert 0.8 < shuffled["concept/shown"] < 1, "next to each picture stands one of the same concept"

    paper = Image.new("RGB", (64, 64), BLUEPRINT_PAPER)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for nothing in (paper, noise):
        found = means("concept", scenes, [nothing] * 30)
        assert {found[f"concept/{name}"] for name in ("all", "shown", "chance", "constant", *CONCEPTS)} == {0}

    constant = means("concept", scenes, [render(scenes[0], 0)] * 30)
    assert constant["concept/all"] == constant["concept/constant"] == pytest.approx(1 / 30)
    assert constant["concept/shown"] == pytest.approx(1 / 3), "one blueprint for all: that is why shown is not learned"


def test_of_the_base_world_all_attributes_count() -> None:
    scenes = mixed_scenes(12, "test", 0, ["base"])
    pictures = drawn(scenes)
    pictures[0] = render(scenes[1], 5)
    found = means("base_kept", scenes, pictures)
    assert found["base_kept/all"] == pytest.approx(11 / 12)
    assert found.keys() == {"base_kept/all", *(f"base_kept/{name}" for name in ATTRIBUTES)}


def test_a_network_from_scratch_had_nothing_to_keep() -> None:
    values = {
        "scratch": {},
        "data": {"source": "shapes"},
        "shapes": {"scenes": ["base", "heart"], "checked_prompts": 12},
    }
    (group, scenes), *others = checked_scenes(build_run(values)).items()
    assert (group, others) == ("world", [])
    assert {concept for scene in scenes for concept in scene.concepts} == {"heart"}
    assert sum(not scene.concepts for scene in scenes) == 6
    pictures = drawn(scenes)
    pictures[0] = render(scenes[1], 5)
    found = means("world", scenes, pictures)
    assert found["world/all"] == pytest.approx(11 / 12)
    assert found["world/constant"] == pytest.approx(1 / 12)
    assert found["world/chance"] == pytest.approx(12 / 144)
    declared = MEASURES["checker"].declared("world", build_run(values))
    assert found.keys() <= declared.keys()
    assert declared["world/all"].role == "learned"


def test_a_striped_thing_has_no_colour_of_its_own() -> None:
    for scene in sample_scenes(8, "test", 0, "striped"):
        assert scene.color == ""
        assert read(render(scene, 3))["color"] == ""
    assert read(render(CIRCLE, 0))["color"] in COLORS
    assert checker.METRICS["concept/all"].role == "learned"


def test_what_is_learned_and_kept_speaks_for_a_run() -> None:
    run = build_run({"adapter": {}, "data": {"source": "shapes"}, "shapes": {}})
    declared = {group: MEASURES["checker"].declared(group, run) for group in ("concept", "base_kept")}
    assert declared["concept"]["concept/all"].role == "learned"
    assert declared["base_kept"]["base_kept/all"].role == "kept"


def test_what_a_prompt_leaves_open_is_right_whatever_it_is() -> None:
    values = {
        "data": {"source": "shapes"},
        "adapter": {},
        "shapes": {"scenes": ["base", "heart"], "captioned": ["shape", "color"]},
    }
    asked, whole = (
        checked_scenes(build_run(values | {"shapes": shapes}))
        for shapes in (values["shapes"], {"scenes": ["base", "heart"]})
    )
    assert [scene.color for scene in asked["concept"]] == [scene.color for scene in whole["concept"]]
    pictures = [render(scene, 0) for scene in whole["base_kept"]]
    found = checked("base_kept", asked["base_kept"], pictures)
    assert found["base_kept/all"] == [1.0] * len(pictures)
    assert "base_kept/size" not in found
    other = [picture.transpose(Image.Transpose.ROTATE_180) for picture in pictures]  # another position
    symmetric = [scene.shape != "triangle" for scene in asked["base_kept"]]
    right = checked("base_kept", asked["base_kept"], other)["base_kept/all"]
    assert all(value for value, turned in zip(right, symmetric, strict=True) if turned)
    blank = [Image.new("RGB", (64, 64), "white")] * len(pictures)
    assert set(checked("base_kept", asked["base_kept"], blank)["base_kept/all"]) == {0.0}
