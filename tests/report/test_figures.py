"""Figures: every variant is there, names cover nothing, and what a report begins with fits a screen."""

import json

import pytest
from matplotlib.text import Text
from PIL import Image
from reporting import PROMPTS, TRUTH, write_own_study, write_study

from t2ilib.report import (
    load_report,
    plot_cost_quality,
    plot_learned_kept,
    plot_learning_curves,
    plot_overview,
    plot_pictures,
    plots,
    write_markdown,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), range(8))


def test_written_report_has_its_figures(folder, tmp_path):
    path = write_markdown(load_report(folder), tmp_path / "out")
    text = path.read_text()
    for name in ("pictures.png", "learned_kept.png", "curves.png", "cost_quality.png"):
        assert f"]({name})" in text
        with Image.open(path.parent / name) as picture:
            assert min(picture.size) > 300


def test_figures_show_every_variant(folder):
    report = load_report(folder)
    curves = plot_learning_curves(report).axes[0]
    assert [text.get_text() for text in curves.texts] == ["dora", "lora", "qlora"]  # by final loss, lowest first
    assert list(curves.lines[0].get_xdata()) == [0, 50, 100]
    assert len(plot_pictures(report).axes) == 4 * 3
    assert [plot.file for plot in plots(report)] == [
        "pictures.png",
        "learned_kept.png",
        "curves.png",
        "cost_quality.png",
    ]


def test_a_long_prompt_does_not_push_the_pictures_away(tmp_path):
    folder = write_study(tmp_path / "study", [0])
    for path in folder.glob("*/seed0/pictures/prompts.json"):
        path.write_text(json.dumps(["a long caption " * 30, *PROMPTS[1:]]))
    titles = [axes.get_title() for axes in plot_pictures(load_report(folder)).axes[:3]]
    assert titles[0].endswith("…")
    assert max(map(len, titles)) < 110
    assert titles[1].replace("\n", " ") == PROMPTS[1]


WIDE = {
    f"text_encoder_no_unet_simple_sparse_{i}": (0.6 + 0.001 * i, 0.8, 0.2 + 0.002 * i, 40_000) for i in range(9)
} | {"lora": TRUTH["lora"], "base": TRUTH["base"]}
NARROW = {name.replace("text_encoder_no_unet_simple_sparse_", "v-"): truth for name, truth in WIDE.items()}


def apart(texts) -> bool:
    boxes = [Text.get_window_extent(text) for text in texts]  # without the leader lines
    return not any(boxes[i].overlaps(boxes[j]) for i in range(len(boxes)) for j in range(i))


@pytest.mark.parametrize("truth", [NARROW, WIDE], ids=["narrow", "wide"])
def test_names_of_crowded_points_do_not_overlap_and_stay_inside(tmp_path, truth):
    report = load_report(write_study(tmp_path / "study", [0, 1], truth))
    figures = {"cost": (plot_cost_quality(report), 6, 11), "kept": (plot_learned_kept(report), 1, 11)}
    for figure, panels, names in figures.values():
        figure.draw_without_rendering()
        assert len(figure.axes) == panels
        for axes in figure.axes:
            assert len(axes.texts) == names
            assert apart(axes.texts)
            frame = figure.bbox
            assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in map(Text.get_window_extent, axes.texts))
    curves = plot_learning_curves(report)
    curves.draw_without_rendering()
    assert apart(curves.axes[0].texts)


def test_up_and_right_is_good(folder, tmp_path):
    """Shares as they are; held-out loss turned round, against the CLIP score; one measure alone, a line a variant."""
    axes = plot_learned_kept(load_report(folder)).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("base kept", "concept learned")
    assert {text.get_text() for text in axes.texts} == {"base", "lora", "dora", "qlora"}
    own = load_report(write_own_study(tmp_path / "own", [0, 1]))
    axes = plot_learned_kept(own).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("CLIP score", "held-out loss (lower is better)")
    assert (axes.xaxis_inverted(), axes.yaxis_inverted()) == (False, True)
    alone = load_report(write_own_study(tmp_path / "alone", [0, 1], scores=False))
    axes = plot_learned_kept(alone).axes[0]
    assert axes.xaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["qlora", "dora", "lora", "base"], "base on top"


@pytest.mark.parametrize("variants", [2, 4, 9])
def test_the_overview_leaves_room_for_the_verdicts(tmp_path, variants):
    """A screen of 1500 x 1100 pixels, of which title, question and margins take some 200, the table's head 45, a row
    of two lines 43."""
    truth = {"base": TRUTH["base"]} | {f"v{i}": TRUTH["lora"] for i in range(variants - 1)}
    folder = write_study(tmp_path / "study", [0], truth, reference="v0")
    for path in folder.glob("*/seed0/pictures/prompts.json"):
        path.write_text(json.dumps([f"{prompt} {i}" for prompt in PROMPTS for i in range(3)][:8]))
        for i in range(8):
            Image.new("RGB", (16, 16)).save(path.parent / f"{i:02d}.png")
    study = json.loads((folder / "study.json").read_text())
    for told in study["variants"].values():
        told["title"] = "QLoRA on both text encoders and many UNet layers, " * 3
    (folder / "study.json").write_text(json.dumps(study))
    figure = plot_overview(load_report(folder))
    figure.draw_without_rendering()
    assert apart([axes.yaxis.label for axes in figure.axes[:-1:8]]), "titles of variants"
    width, height = figure.get_size_inches() * 100
    assert width <= 1420
    assert height + 200 + 45 + 43 * variants <= 1100
    assert len(figure.axes) == 8 * variants + 1


def test_the_overview_is_what_there_is(tmp_path):
    folder = write_study(tmp_path / "study", [0])
    for path in folder.glob("*/seed0/pictures/prompts.json"):
        path.unlink()
    assert len(plot_overview(load_report(folder)).axes) == 1


def test_what_is_worse_than_nothing_is_drawn_too(tmp_path):
    """A share of a way gone, as measures without a checker give it, may be below zero."""
    folder = write_study(tmp_path / "study", [0])
    path = folder / "dora" / "seed0" / "result.json"
    result = json.loads(path.read_text())
    result["metrics"]["concept/learned"] = -0.8
    path.write_text(json.dumps(result))
    axes = plot_learned_kept(load_report(folder)).axes[0]
    assert axes.get_ylim()[0] < -0.8
    assert min(axes.get_yticks()) < -0.5
    ordinary = plot_learned_kept(load_report(write_study(tmp_path / "ordinary", [0]))).axes[0]
    assert ordinary.get_ylim()[0] >= -0.05
