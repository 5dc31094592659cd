"""Saving a pipeline: whole or not there, whenever a kill comes."""

from pathlib import Path

import pytest
import torch

from t2ilib.models.pipeline import INDEX, put_in_place, save_pipeline


class Killed(BaseException):
    pass


def draft_of(folder: Path, number: int) -> Path:
    """A pipeline of so many parts' worth, as diffusers writes it."""
    for part in ("unet", "vae"):
        (folder / part).mkdir(parents=True)
        (folder / part / "weights").write_text(str(number))
    (folder / INDEX).write_text(str(number))
    return folder


def killed_at(number: int, monkeypatch, action) -> bool:
    """Whether `action` was ended before its change number `number` of the disk."""
    calls = []

    def deadly(real):
        def call(*arguments, **named):
            calls.append(real)
            if len(calls) == number:
                raise Killed
            return real(*arguments, **named)

        return call

    from t2ilib.models import pipeline

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch.setattr(Path, name, deadly(getattr(Path, name)))
        patch.setattr(pipeline.shutil, "rmtree", deadly(pipeline.shutil.rmtree))
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("before", [True, False])
def test_a_kill_leaves_no_pipeline_that_is_half_of_one(tmp_path: Path, monkeypatch, before: bool) -> None:
    number = 0
    while True:
        number += 1
        place = tmp_path / str(number)
        folder = place / "model"
        if before:
            draft_of(folder, 1)
            (folder / "notes.md").write_text("mine")
        draft = draft_of(place / ".model.saving", 2)
        killed = killed_at(number, monkeypatch, lambda draft=draft, folder=folder: put_in_place(draft, folder))
        if (folder / INDEX).exists():
            parts = {(folder / part / "weights").read_text() for part in ("unet", "vae")}
            assert parts == {(folder / INDEX).read_text()}, f"killed before change {number}"
        if before:
            assert (folder / "notes.md").read_text() == "mine"
        if not killed:
            break
    assert (folder / INDEX).read_text() == "2"
    assert number == (8 if before else 2)


def test_saving_over_another_replaces_it(make, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    components = make("sd15")
    save_pipeline(components, tmp_path / "model")
    (tmp_path / ".model.saving").mkdir()
    (tmp_path / ".model.saving" / "half").write_text("of a kill")
    with torch.no_grad():
        components.unet.conv_in.weight.add_(1)
    save_pipeline(components, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "half").exists()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    assert torch.equal(loaded.unet.conv_in.weight, components.unet.conv_in.weight)
