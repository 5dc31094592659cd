"""What drawn pictures are held against: real pictures as they were split, and the base's own, drawn once, whatever was done to the base."""

import numpy as np
import pytest
from own_pictures import run_on, ten

from t2ilib.evaluation import references
from t2ilib.evaluation.references import (
    base_pictures,
    keep_base_pictures,
    lacks_base,
    lacks_held_out,
    real_pictures,
    stands_still,
)
from t2ilib.evaluation.sampling import draw
from t2ilib.models.alone import adapters_off
from t2ilib.models.load import load_base
from t2ilib.runfile import build_run
from t2ilib.training.loop import train

__all__ = ["ten"]
PROMPTS = ("a red circle", "a heart")


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.fixture
def drawn_anew(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """A cache folder of its own, and what was drawn for it."""
    calls = []
    monkeypatch.setenv("T2ILIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "draw", lambda *a, **k: calls.append(a[1]) or draw(*a, **k))
    return calls


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"text_encoder_targets": "attention"}},
        {"adapter": {"init": "pissa"}},
        {"adapter": {"tokens": {"<it>": "heart"}}, "data": {"captions": [{"trigger": "<it>"}]}},
        {"adapter": None, "training": {"trains": "unet"}},
        {"objective": {"name": "v_prediction"}},
    ],
    ids=["adapter", "pissa", "word", "unet", "v_prediction"],
)
def test_the_bases_own_pictures_whatever_was_trained(ten, sections, drawn_anew) -> None:
    run = run_on(ten, **sections)
    components = train(run).components
    before = pixels(draw(components, PROMPTS, run.evaluation, resolution=64))
    trained = {
        name: p.requires_grad for module in components.modules().values() for name, p in module.named_parameters()
    }
    found = pixels(base_pictures(run, components, PROMPTS, {}))
    assert (found == pixels(draw(load_base(run.model), PROMPTS, run.evaluation, resolution=64))).all()
    assert (found != before).any(), "training changed nothing, so this shows nothing"
    assert (pixels(draw(components, PROMPTS, run.evaluation, resolution=64)) == before).all()
    assert trained == {
        name: p.requires_grad for module in components.modules().values() for name, p in module.named_parameters()
    }


def test_they_are_drawn_once_for_all_runs_that_share_what_decides_them(ten, drawn_anew) -> None:
    run, components = run_on(ten), load_base(run_on(ten).model)
    first = pixels(base_pictures(run, components, PROMPTS, {}))
    again = run_on(ten, seed=3, adapter={"kind": "dora"}, output=str(ten.parent / "other"))
    assert (pixels(base_pictures(again, components, PROMPTS, {})) == first).all()
    assert len(drawn_anew) == 1
    for other in (run_on(ten, evaluation={"guidance_scale": 3.0}), run_on(ten, data={"resolution": 32})):
        base_pictures(other, components, PROMPTS, {})
    base_pictures(run, components, PROMPTS[:1], {})
    assert len(drawn_anew) == 4


def test_what_the_untouched_base_drew_as_a_run_is_not_drawn_again(ten, drawn_anew) -> None:
    base = run_on(ten, adapter=None, training={"trains": "nothing", "steps": 0})
    components = load_base(base.model)
    pictures = draw(components, PROMPTS, base.evaluation, resolution=64)
    for run in (run_on(ten), run_on(ten, objective={"name": "v_prediction"}), base):
        keep_base_pictures(run, components, PROMPTS, pictures if run is base else pictures[::-1])
    assert (pixels(base_pictures(run_on(ten), components, PROMPTS, {})) == pixels(pictures)).all()
    assert not drawn_anew


def test_other_weights_of_one_name_are_another_base(ten, tmp_path, drawn_anew) -> None:
    import os
    import shutil

    from t2ilib.models.files.locate import SHIPPED

    shutil.copytree(SHIPPED["tiny-sdxl"], tmp_path / "base")
    run = run_on(ten, model={"base": str(tmp_path / "base")})
    components = load_base(run.model)
    base_pictures(run, components, PROMPTS, {})
    os.utime(next((tmp_path / "base" / "unet").glob("*.safetensors")), (1, 1))
    base_pictures(run, components, PROMPTS, {})
    assert len(drawn_anew) == 2


def test_adapters_act_again_after_an_error(ten) -> None:
    components = train(run_on(ten)).components
    before = pixels(draw(components, PROMPTS, run_on(ten).evaluation, resolution=64))
    with pytest.raises(ZeroDivisionError), adapters_off(components):
        raise ZeroDivisionError
    assert (pixels(draw(components, PROMPTS, run_on(ten).evaluation, resolution=64)) == before).all()


def test_real_pictures_are_those_of_the_split_with_captions_as_they_stand(ten, monkeypatch) -> None:
    from t2ilib.data.dataset import load_datasets

    run = run_on(ten, data={"captions": ["no_adjectives"]})
    training, held_out = real_pictures(run, shared := {})
    own, apart = load_datasets(run_on(ten))
    assert [len(training), len(held_out)] == [len(own), len(apart)]
    assert [captions[0] for captions in held_out.captions] == apart.captions(), (
        "captions must not depend on a variant's edits"
    )
    assert real_pictures(run, shared)[0] is training
    assert training.pictures[0].size == (64, 64)
    drawn = run_on(ten, data={"sample": 4})
    assert [captions[0] for captions in real_pictures(drawn, {})[0].captions] == load_datasets(drawn)[0].captions()
    monkeypatch.setattr(references, "MOST", 3)
    few, _ = real_pictures(run, {})
    assert len(few) == 3
    assert set(few.captions) < set(training.captions)
    assert few.captions == real_pictures(run, {})[0].captions


def test_what_cannot_be_compared_is_told(ten) -> None:
    assert lacks_held_out(run_on(ten)) is None
    assert lacks_held_out(run_on(ten, data={"validation_share": 0.0})).startswith(
        "no pictures are held out: set data.validation_share"
    )
    streamed = {"data": {"source": "webdataset", "path": "x.tar", "streaming": True}, "adapter": {}}
    assert "a stream is not kept" in lacks_held_out(build_run(streamed))
    assert lacks_base(build_run({"scratch": {"unet": "tiny"}, "data": {"source": "shapes"}})) is not None
    assert lacks_base(run_on(ten)) is None
    assert stands_still(run_on(ten))
