"""Grids: every cell what its row and column say, drawn in the order that loads least, on a sheet that can be drawn again."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from t2ilib.config import ConfigError
from t2ilib.drawing.axes import parse_axis
from t2ilib.drawing.desk import Desk, Drawing
from t2ilib.drawing.grid import cell_side, changes_of, draw_grid, make_sheet, plan_grid
from t2ilib.drawing.pngtext import read_picture
from t2ilib.drawing.settings import build_settings

BRIEF = {"num_inference_steps": 2, "guidance_scale": 2.0}


def settings(**values):
    return build_settings({"prompt": "a red heart", **BRIEF, **values})


def grid_of(base, x, y=None):
    return plan_grid(base, parse_axis(x), parse_axis(y) if y else None)


def test_every_cell_has_its_rows_and_columns_values():
    grid = grid_of(settings(), "steps: 2, 3, 4", "seed: 8, 9")
    assert [[(cell.num_inference_steps, cell.seed) for cell in row] for row in grid.cells] == [
        [(2, 8), (3, 8), (4, 8)],
        [(2, 9), (3, 9), (4, 9)],
    ]
    line = grid_of(settings(num_pictures=4), "seed: 1-3")
    assert [[cell.seed for cell in row] for row in line.cells] == [[1, 2, 3]]
    assert all(cell.num_pictures == 1 for row in line.cells for cell in row)


@pytest.mark.parametrize("turned", [False, True])
def test_an_adapter_comes_before_its_strength_whichever_axis_it_is(turned):
    axes = ("adapter: none, cat", "strength: 0.5, 1")
    grid = grid_of(settings(), *(axes[::-1] if turned else axes))
    cells = [[[(a.path, a.strength) for a in cell.adapters] for cell in row] for row in grid.cells]
    expected = [[[], [("cat", 0.5)]], [[], [("cat", 1.0)]]]
    assert cells == ([list(row) for row in zip(*expected, strict=True)] if turned else expected)


def test_words_may_change_along_both_axes():
    grid = grid_of(settings(), "prompt: red, blue", "prompt: heart, square")
    assert [[cell.prompt for cell in row] for row in grid.cells] == [
        ["a red heart", "a blue heart"],
        ["a red square", "a blue square"],
    ]
    whole = grid_of(settings(prompt=""), "seed: 1, 2", "prompt: a heart, a square")
    assert [[cell.prompt for cell in row] for row in whole.cells] == [["a heart"] * 2, ["a square"] * 2]


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        ("seed: 1", "seed: 2", "both axes are seed"),
        ("prompt: red, a", "prompt: red, b", "both axes are prompt"),
        ("strength: 1", "seed: 1", "there is no adapter number 1; the settings have 0"),
        ("seed: 1-30", "steps: 1-30", "the grid has 900 cells, and 400 are the most"),
    ],
)
def test_axes_that_do_not_go_together_are_told(x, y, told):
    with pytest.raises(ConfigError, match=told):
        grid_of(settings(), x, y)


def num_changes(grid, order, part):
    seen = [changes_of(grid.cells[row][column])[part] for row, column in order]
    return sum(one != other for one, other in itertools.pairwise(seen))


def test_it_is_drawn_in_the_order_that_loads_least():
    grid = grid_of(settings(), "adapter: cat, none, dog, cat", "sampler: Euler, DDIM, Euler")
    order = grid.order()
    assert sorted(order) == [(row, column) for row in range(3) for column in range(4)]
    assert num_changes(grid, order, 1) == 2, "three different adapters, so two changes"
    assert num_changes(grid, order, 2) == 5, "each with two samplers"
    row_by_row = sorted(order)
    assert num_changes(grid, row_by_row, 1) > 8
    steps = grid_of(settings(adapters=[{"path": "cat"}]), "checkpoint: 1, 2", "seed: 1-4")
    assert num_changes(steps, steps.order(), 1) == 1
    assert [steps.cells[r][c].seed for r, c in steps.order()] == [1, 2, 3, 4, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def desk(results):
    return Desk(results, device=torch.device("cpu"))


def test_a_drawn_sheet_shows_every_cell_and_can_be_drawn_again(desk, results, tmp_path):
    cat = {"path": str(results / "cat")}
    grid = grid_of(settings(adapters=[cat], width=96, height=64), "strength: 0, 1", "checkpoint: 1, last")
    told = []
    sheet = draw_grid(desk, grid, watch=told.append)
    assert told[-1].done == told[-1].total == 4
    for (row, column), picture in sheet.pictures.items():
        alone = desk.draw(grid.cells[row][column]).pictures[0]
        assert abs(np.asarray(picture.image, int) - np.asarray(alone.image, int)).max() <= 1, (row, column)
    assert np.array_equal(sheet.pictures[0, 0].image, sheet.pictures[1, 0].image), (
        "at strength 0 the step does not matter"
    )
    assert not np.array_equal(sheet.pictures[0, 1].image, sheet.pictures[1, 1].image)
    path = sheet.save(tmp_path)
    assert path.name == "grid-00.png"
    assert sheet.save(tmp_path).name == "grid-01.png"
    shown = Image.open(path)
    cell = np.asarray(sheet.pictures[1, 1].image.resize((192, 128), Image.Resampling.NEAREST))
    corner = np.asarray(shown)[-6 - 128 : -6, -6 - 192 : -6]
    assert np.array_equal(corner, cell), "wide pictures stay wide, the last cell at the end"
    restored = read_picture(path)
    assert restored.settings == grid.settings
    again = grid_of(restored.settings, *restored.grid.values())
    assert again.cells == grid.cells
    text = shown.info["parameters"]
    assert 'Script: X/Y/Z plot, X Type: Strength, X Values: "0, 1", Y Type: Checkpoint, Y Values: "1, last"' in text
    assert "<lora:cat-000001:0>" in text, "of its first cell"


def test_random_seeds_are_written_as_what_they_were(desk, tmp_path):
    grid = grid_of(settings(), "seed: random, random")
    path = draw_grid(desk, grid).save(tmp_path)
    restored = read_picture(path)
    assert grid_of(restored.settings, restored.grid["x"]).cells == grid.cells


def test_a_stopped_grid_keeps_what_it_has(desk, tmp_path):
    grid, told = grid_of(settings(), "steps: 2, 3", "seed: 1, 2"), []
    sheet = draw_grid(desk, grid, watch=told.append, stop=lambda: bool(told) and told[-1].done >= 2)
    assert sheet.stopped
    assert sorted(sheet.pictures) == [(0, 0), (1, 0)], "both seeds of the first column were one batch"
    assert sheet.image.getpixel((sheet.image.width - 20, sheet.image.height - 20)) == (0xCC, 0xCC, 0xCC)
    nothing = make_sheet(grid, Drawing((), stopped=True))
    with pytest.raises(ConfigError, match="stopped before its first picture"):
        nothing.save(tmp_path)


def test_sheets_stay_of_a_size_that_can_be_opened():
    assert [cell_side(side, 4) for side in (64, 96, 512, 1024)] == [128, 192, 512, 512]
    assert cell_side(1024, 400) ** 2 * 400 <= 2**26
