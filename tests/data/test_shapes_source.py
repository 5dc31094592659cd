import shutil

import pytest

from t2ilib.config import DataConfig, ShapesConfig
from t2ilib.data.dataset import load_datasets
from t2ilib.data.sources import folder
from t2ilib.runfile import build_run
from t2ilib.shapes import source as shapes_source
from t2ilib.shapes import world
from t2ilib.shapes.checker import checked_scenes

CONFIG = DataConfig()


def drawn_run(config):
    return build_run({"adapter": {}, "data": {"source": "shapes"}, "shapes": config})


@pytest.fixture
def shapes_config(tmp_path, monkeypatch):
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shapes_source, "NUM_VALIDATION", 3)
    return ShapesConfig(num_pictures=4, scenes=("base", "heart"))


def test_shapes_are_drawn_once(shapes_config, tmp_path, monkeypatch):
    training, held_out = load_datasets(drawn_run(shapes_config))
    assert (training.name, len(training), len(held_out)) == ("shapes-base-heart", 4, 3)
    assert all(tmp_path in record.path.parents for record in training.records)
    truths = [world.scene_from(record.scene) for record in training.records]
    assert [scene.concepts for scene in truths] == [(), (), ("heart",), ("heart",)]
    assert {world.split_of(scene) for scene in truths} == {"train"}
    assert {world.split_of(world.scene_from(record.scene)) for record in held_out.records} == {"validation"}
    calls = []
    monkeypatch.setattr(world, "render", lambda *_: calls.append(1))
    again, _ = load_datasets(drawn_run(shapes_config))
    assert again.digest == training.digest
    assert not calls


def test_what_settings_are_searched_on_is_in_nothing_that_final_runs_see(shapes_config):
    """Neither trained on, nor held out, nor asked for at the end."""
    config = shapes_config.model_copy(update={"num_pictures": 60, "checked_prompts": 40})
    seen = {}
    for part in ("final", "tuning"):
        run = build_run({"adapter": {}, "data": {"source": "shapes", "part": part}, "shapes": config.model_dump()})
        training, held_out = load_datasets(run)
        assert (len(training), len(held_out)) == (60, 3)
        scenes = [world.scene_from(record.scene) for record in (*training.records, *held_out.records)]
        scenes += [scene for group in checked_scenes(run).values() for scene in group]
        assert len(set(scenes)) == len(scenes) == 60 + 3 + 2 * 40
        seen[part] = set(scenes)
    assert not seen["final"] & seen["tuning"]
    assert {scene.concepts for scene in seen["tuning"]} == {scene.concepts for scene in seen["final"]}


def test_data_seed_and_scenes_have_folders_of_their_own(shapes_config):
    first, other_seed, other_scenes = (
        shapes_source.load(shapes_config.model_copy(update=change))[0]
        for change in ({}, {"seed": 1}, {"scenes": ("base",)})
    )
    assert len({record.path.parent for records in (first, other_seed, other_scenes) for record in records}) == 3
    assert [r.scene for r in first] != [r.scene for r in other_seed]


def test_another_process_that_draws_at_the_same_time_does_no_harm(shapes_config, monkeypatch):
    """While this process is about to commit its folder, another one commits the same folder."""
    write_folder, others = world.write_folder, []

    def overtaken(draft, *args, **kwargs):
        written = write_folder(draft, *args, **kwargs)
        monkeypatch.setattr(world, "write_folder", write_folder)
        others.append(shapes_source.drawn(shapes_config, "train", 4))
        (others[0] / "mark").touch()
        return written

    monkeypatch.setattr(world, "write_folder", overtaken)
    mine = shapes_source.drawn(shapes_config, "train", 4)
    assert mine == others[0]
    assert (mine / "mark").exists()
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]
    assert len(folder.read_folder(mine, CONFIG)) == 4


def test_an_interrupted_drawing_leaves_no_folder_that_looks_whole(shapes_config, monkeypatch):
    draw = world.render
    calls = iter(range(100))

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(world, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes_source.drawn(shapes_config, "train", 4)
    assert not [p for p in (shapes_source.cache_folder() / "shapes").iterdir() if not p.name.startswith(".")]
    assert len(folder.read_folder(shapes_source.drawn(shapes_config, "train", 4), CONFIG)) == 4


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("T2ILIB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shapes_source.cache_folder() == tmp_path / "t2ilib"
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "mine"))
    assert shapes_source.cache_folder() == tmp_path / "mine"


def test_a_changed_world_is_drawn_anew(shapes_config, monkeypatch, tmp_path):
    before = shapes_source.drawn(shapes_config, "train", 4)
    changed = tmp_path / "shapes.py"
    shutil.copy(world.__file__, changed)
    changed.write_text(changed.read_text() + "\n")
    monkeypatch.setattr(world, "__file__", str(changed))
    assert shapes_source.drawn(shapes_config, "train", 4) != before
