"""What lies in memory: the base as it was once adapters are off, the last one gone, and only what differs loaded."""

import gc
import weakref

import numpy as np
import psutil
import pytest
import torch

from t2ilib.adapters.load import load_adapter
from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.drawing import loaded as module
from t2ilib.drawing.loaded import Loaded
from t2ilib.drawing.settings import build_settings
from t2ilib.evaluation.sampling import draw
from t2ilib.models.load import load_base
from t2ilib.training.state import load_checkpoint_adapter

CPU = torch.device("cpu")
SETTINGS = EvaluationConfig(num_inference_steps=2, guidance_scale=2.0)


def settings(*adapters, base="tiny-sdxl", **values):
    listed = [adapter if isinstance(adapter, dict) else {"path": str(adapter)} for adapter in adapters]
    return build_settings({"model": {"base": base}, "adapters": listed, **values})


def picture(components, prompt="a red heart"):
    return np.asarray(draw(components, [prompt], SETTINGS)[0], int)


@pytest.fixture
def loaded(results):
    return Loaded(CPU, results)


@pytest.fixture(scope="module")
def alone():
    return {base: picture(load_base(ModelConfig(base=base))) for base in ("tiny-sdxl", "tiny-sd15")}


def test_it_draws_as_one_who_loads_the_same_does(loaded, results, alone):
    expected = load_base(ModelConfig())
    load_adapter(expected, results / "cat")
    with_cat = picture(loaded.take(settings(results / "cat")))
    assert (with_cat == picture(expected)).all()
    assert abs(with_cat - alone["tiny-sdxl"]).max() > 8, "an adapter that does nothing shows nothing"
    assert (picture(loaded.take(settings())) == alone["tiny-sdxl"]).all(), "the base is bit for bit what it was"
    half = loaded.take(settings({"path": str(results / "cat"), "strength": 0.5}))
    assert abs(picture(half) - with_cat).max() > 1


def test_two_adapters_add_up_in_any_order_and_each_by_its_strength(loaded, results):
    one, two = str(results / "cat"), str(results / "study-quick" / "pissa" / "seed0")
    both = picture(loaded.take(settings({"path": one, "strength": 0.5}, {"path": two, "strength": 0.25})))
    turned = picture(loaded.take(settings({"path": two, "strength": 0.25}, {"path": one, "strength": 0.5})))
    assert abs(both - turned).max() <= 1
    off = picture(loaded.take(settings({"path": one, "strength": 0.5}, {"path": two, "strength": 0.0})))
    assert (off == picture(loaded.take(settings({"path": one, "strength": 0.5})))).all()
    assert abs(both - off).max() > 1


def test_only_what_differs_is_loaded(loaded, results, monkeypatch):
    bases, adapters = [], []
    monkeypatch.setattr(module, "load_base", lambda model, device: bases.append(model.base) or load_base(model, device))
    monkeypatch.setattr(module, "load_adapter", lambda *a: adapters.append(a[1].parents[1].name) or load_adapter(*a))
    cat = {"path": str(results / "cat")}
    for strength in (1.0, 0.5, 0.0):
        loaded.take(settings(cat | {"strength": strength}, prompt=str(strength)))
    assert (bases, adapters) == (["tiny-sdxl"], ["cat"])
    loaded.take(settings())
    loaded.take(settings(base="tiny-sd15"))
    assert (bases, adapters) == (["tiny-sdxl", "tiny-sd15"], ["cat"])


def test_a_file_that_is_written_anew_is_loaded_anew(loaded, results, tmp_path):
    target = tmp_path / "pytorch_lora_weights.safetensors"
    first, second = (results / name / "adapter" / target.name for name in ("cat", "study-quick/pissa/seed0"))
    target.write_bytes(first.read_bytes())
    before = picture(loaded.take(settings(target)))
    target.write_bytes(second.read_bytes())
    assert abs(picture(loaded.take(settings(target))) - before).max() > 1


def test_words_go_with_the_adapter_that_brought_them(loaded, results, alone):
    prompt = "a red <heart>"
    expected = load_base(ModelConfig(base="tiny-sd15"))
    plain = picture(expected, prompt)
    load_adapter(expected, results / "words")
    worded = picture(loaded.take(settings(results / "words", base="tiny-sd15")), prompt)
    assert (worded == picture(expected, prompt)).all()
    components = loaded.take(settings(base="tiny-sd15"))
    assert components.words == {}
    assert (picture(components, prompt) == plain).all()
    assert (picture(components) == alone["tiny-sd15"]).all()
    again = loaded.take(settings(results / "words", base="tiny-sd15"))
    assert (picture(again, prompt) == worded).all(), "and come back with it"


def test_embeddings_are_the_bases_too_and_words_of_adapters_are_not(loaded, results):
    file = str(results / "words" / "adapter" / "heart.safetensors")
    components = loaded.take(settings(base="tiny-sd15", embeddings=[file]))
    assert loaded.words == {file: "<heart>"}
    alone = picture(components, "a <heart>")
    with loaded.without_adapters(()) as base:
        assert (picture(base, "a <heart>") == alone).all()
    asked = settings(results / "words", base="tiny-sd15")
    components = loaded.take(asked)
    before = picture(components, "a <heart>")
    with loaded.without_adapters(asked.adapters) as base:
        assert base.words == {}
        assert (picture(base, "a <heart>") == picture(load_base(ModelConfig(base="tiny-sd15")), "a <heart>")).all()
    assert (picture(components, "a <heart>") == before).all()


@pytest.mark.parametrize("name", ["cat", "study-quick/pissa/seed0", "words"])
def test_the_steps_of_a_run(loaded, results, alone, name):
    """Those that are kept as files, those in checkpoints alone, and those whose training changed the base."""
    run, base = results / name, "tiny-sd15" if name == "words" else "tiny-sdxl"
    expected = load_base(ModelConfig(base=base))
    step = 2 if name == "words" else 1
    load_checkpoint_adapter(expected, run, step)
    at_step = picture(loaded.take(settings({"path": str(run), "step": step}, base=base)))
    assert abs(at_step - picture(expected)).max() <= 1
    last = picture(loaded.take(settings({"path": str(run), "step": 2}, base=base)))
    finished = picture(loaded.take(settings(run, base=base)))
    assert abs(last - finished).max() <= 1
    if step == 1:
        assert abs(at_step - last).max() > 1
    assert (picture(loaded.take(settings(base=base))) == alone[base]).all()


def test_the_last_base_and_its_adapters_are_gone_from_memory(loaded, results):
    components = loaded.take(settings(results / "cat"))
    unet = components.unet
    layers = [
        weakref.ref(m.lora_A["adapter0"].weight) for m in unet.modules() if "adapter0" in getattr(m, "lora_A", {})
    ]
    assert len(layers) > 4
    parts = [weakref.ref(part) for part in (unet, components.vae, *components.text_encoders.values())]
    del components, unet
    loaded.take(settings())
    gc.collect()
    assert not any(layer() for layer in layers), "an adapter that was taken off is still there"
    loaded.take(settings(base="tiny-sd15"))
    gc.collect()
    assert not any(part() for part in parts), "a base that was replaced is still there"


def test_memory_does_not_grow_over_many_changes(loaded, results):
    process, readings = psutil.Process(), []
    for number in range(5):
        for choice in (settings(results / "cat"), settings(results / "words", base="tiny-sd15")):
            loaded.take(choice)
        if number in (1, 4):
            readings.append(process.memory_info().rss)
    assert readings[1] - readings[0] < 40e6, "six bases of 20 MB each were loaded between the readings"


def test_what_cannot_be_attached_leaves_the_base_as_it_was(loaded, results, alone):
    other = settings(results / "words")  # of SD1.5, over SDXL
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"does not fit tiny-sdxl|another base|another model|no place"):
            loaded.take(other)
    assert (picture(loaded.take(settings())) == alone["tiny-sdxl"]).all()
    with pytest.raises(ConfigError, match="no adapter at"):
        loaded.take(settings("nowhere"))
    with pytest.raises(ConfigError, match=r"has no checkpoint of step 7; there are 1, 2"):
        loaded.take(settings({"path": str(results / "cat"), "step": 7}))
    with pytest.raises(ConfigError, match="no-such-base"):
        loaded.take(settings(base="no-such-base/at-all"))
    assert (picture(loaded.take(settings())) == alone["tiny-sdxl"]).all()


def test_another_file_under_the_same_name_is_told(loaded, results, caplog):
    asked = settings(results / "cat")
    loaded.take(asked)
    (told,) = loaded.told(asked)
    assert len(told.digest) == 12
    loaded.take(asked.model_copy(update={"adapters": (told,)}))
    assert "another adapter now" not in caplog.text
    loaded.take(asked.model_copy(update={"adapters": (told.model_copy(update={"digest": "0" * 12}),)}))
    assert f"is another adapter now ({told.digest}) than the picture was drawn with ({'0' * 12})" in caplog.text
