"""The desk: the same picture whatever stands beside it, previews, stopping, turns, the base beside the adapter, and what goes wrong."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from t2ilib.adapters.load import load_adapter
from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.drawing import desk as module
from t2ilib.drawing.desk import Desk, Drawing, Progress
from t2ilib.drawing.samplers import SAMPLERS
from t2ilib.drawing.settings import build_settings
from t2ilib.evaluation.sampling import draw
from t2ilib.memory import GIB
from t2ilib.models.load import load_base
from t2ilib.models.pipeline import build_pipeline
from t2ilib.seeds import generator_for

CPU = torch.device("cpu")
BRIEF = {"num_inference_steps": 3, "guidance_scale": 2.0}


def settings(**values):
    return build_settings({"prompt": "a red heart", **BRIEF, **values})


def pixels(image):
    return np.asarray(image, int)


def apart(one, other):
    return abs(pixels(one) - pixels(other)).max()


@pytest.fixture(scope="module")
def desk(results):
    return Desk(results, device=CPU)


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig())


def test_pictures_are_those_of_the_library_whatever_the_batch(desk, base):
    asked = settings(num_pictures=3, seed=5, first=1)
    alone = [desk.draw(one).pictures[0] for one in asked.pictures()]
    together = desk.draw(asked).pictures
    small = desk.draw(asked, batch_size=2).pictures
    plain = draw(base, ["a red heart"] * 3, EvaluationConfig(**BRIEF), seed=5, first=1)
    for pictures in (alone, together, small):
        assert [picture.settings.first for picture in pictures] == [1, 2, 3]
        assert all(apart(picture.image, image) <= 1 for picture, image in zip(pictures, plain, strict=True))
    assert apart(alone[0].image, alone[1].image) > 8
    again = desk.draw(together[1].settings).pictures[0]
    assert (pixels(again.image) == pixels(alone[1].image)).all(), "its settings draw it again"
    assert (together[0].sampler, together[0].size) == ("DDIM", (64, 64))


def test_what_differs_by_prompt_and_noise_alone_is_drawn_at_once(desk, monkeypatch):
    batches = []
    monkeypatch.setattr(
        module, "draw", lambda c, prompts, *a, **k: batches.append(list(prompts)) or draw(c, prompts, *a, **k)
    )
    asked = [settings(prompt=p, seed=s) for p, s in (("a", 0), ("b", 7))] + [
        settings(prompt="c", num_inference_steps=2)
    ]
    drawn = desk.draw(asked).pictures
    assert batches == [["a", "b"], ["c"]]
    assert [picture.settings.prompt for picture in drawn] == ["a", "b", "c"]
    assert apart(drawn[1].image, desk.draw(asked[1]).pictures[0].image) <= 1


def test_sides_and_negative_prompts_are_the_pipelines_own(desk, base):
    asked = settings(width=96, height=64, negative_prompt="a blue square", seed=2)
    ours = desk.draw(asked).pictures[0]
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": generator_for(2, "picture", 0)}
    theirs = build_pipeline(base)(
        "a red heart", negative_prompt="a blue square", width=96, height=64, **options
    ).images[0]
    assert ours.image.size == ours.size == (96, 64)
    assert apart(ours.image, theirs) <= 1
    assert desk.draw(settings(height=72)).pictures[0].size == (64, 72)


def test_the_base_beside_an_adapter_is_the_base(desk, base, results):
    asked = settings(adapters=[{"path": str(results / "cat"), "strength": 0.75}], num_pictures=2)
    drawn = desk.draw(asked, beside_base=True).pictures
    plain = draw(base, ["a red heart"] * 2, EvaluationConfig(**BRIEF))
    for picture, image in zip(drawn, plain, strict=True):
        assert apart(picture.base, image) == 0
        assert apart(picture.base, picture.image) > 8
    expected = load_base(ModelConfig())
    load_adapter(expected, results / "cat")
    full = draw(expected, ["a red heart"], EvaluationConfig(**BRIEF))[0]
    assert apart(desk.draw(settings(adapters=[{"path": str(results / "cat")}])).pictures[0].image, full) == 0
    none = desk.draw(settings(), beside_base=True).pictures[0]
    assert none.base is none.image


def test_progress_and_previews_lead_to_the_picture(desk):
    told = []
    drawn = desk.draw(settings(num_inference_steps=6, num_pictures=2), watch=told.append, preview_every=2)
    steps = [progress for progress in told if progress.step]
    assert [progress.step for progress in steps] == [1, 2, 3, 4, 5, 6]
    assert [len(progress.previews) for progress in steps] == [0, 2, 0, 2, 0, 0]
    shares = [progress.share for progress in told]
    assert shares == sorted(shares)
    assert (told[-1].share, told[-1].done, told[-1].doing) == (1.0, 2, "done")
    assert told[-1].finished == drawn.pictures
    final = pixels(drawn.pictures[0].image)
    near = [abs(pixels(progress.previews[0]) - final).mean() for progress in steps if progress.previews]
    assert near[1] < near[0]
    other = [abs(pixels(progress.previews[1]) - final).mean() for progress in steps if progress.previews]
    assert near[1] < other[1], "each preview is of its own picture"


def test_large_previews_are_made_of_fewer_latents(desk, monkeypatch):
    monkeypatch.setattr(module, "PREVIEW_LATENTS", 4)
    told = []
    desk.draw(settings(width=96), watch=told.append, preview_every=1)
    assert next(p for p in told if p.previews).previews[0].size in ((32, 16), (32, 24))


@pytest.mark.parametrize("kind", ["event", "callable"])
def test_it_stops_between_steps_and_keeps_what_is_whole(desk, kind):
    event, calls = threading.Event(), []

    def watch(progress: Progress) -> None:
        calls.append(progress)
        if progress.done == 1 and progress.step == 2:
            event.set()

    asked = [settings(num_inference_steps=4), settings(num_inference_steps=5, seed=1), settings(seed=2)]
    drawing = desk.draw(asked, watch=watch, stop=event if kind == "event" else event.is_set)
    assert drawing.stopped
    assert [picture.settings.seed for picture in drawing.pictures] == [0]
    assert calls[-1].step == 2, "not one more step was taken"
    assert apart(desk.draw(asked[0]).pictures[0].image, drawing.pictures[0].image) == 0, "and the desk goes on"
    assert "step" not in vars(desk.loaded.components.scheduler)
    event.set()
    assert desk.draw(asked, stop=event) == Drawing((), stopped=True)


def test_a_stream_is_what_is_watched_and_leaving_it_stops_it(desk):
    asked = settings(num_inference_steps=4, num_pictures=2)
    events = list(desk.stream(asked, preview_every=2))
    assert isinstance(events[-1], Drawing)
    assert all(isinstance(event, Progress) for event in events[:-1])
    assert apart(events[-1].pictures[1].image, desk.draw(asked).pictures[1].image) == 0
    stream = desk.stream(settings(num_inference_steps=500))
    next(event for event in stream if event.step)
    begun = time.perf_counter()
    stream.close()
    assert not desk.busy
    assert time.perf_counter() - begun < 5, "closing waits for a step, not for 500"
    with pytest.raises(ConfigError, match="no adapter at"):
        list(desk.stream(settings(adapters=[{"path": "nowhere"}])))
    stopped = list(desk.stream(asked, stop=lambda: True))[-1]
    assert stopped == Drawing((), stopped=True)


def test_who_comes_second_waits_for_their_turn(desk):
    told = []
    first = desk.stream(settings(num_inference_steps=30))
    next(event for event in first if event.step)
    second = threading.Thread(target=lambda: told.append(desk.draw(settings(), watch=lambda p: told.append(p.doing))))
    second.start()
    done = [event for event in first][-1]
    second.join()
    assert told[0] == "waiting for what is being drawn"
    assert len(done.pictures) == len(told[-1].pictures) == 1
    third = desk.stream(settings(num_inference_steps=200))
    next(event for event in third if event.step)
    assert desk.draw(settings(), stop=lambda: True).stopped, "who waits can leave"
    third.close()


def test_who_comes_third_is_told_of_both(desk):
    told = {2: [], 3: []}
    first = desk.stream(settings(num_inference_steps=30))
    next(event for event in first if event.step)
    others = []
    for number, seen in told.items():
        asked = {"watch": lambda progress, seen=seen: seen.append(progress.doing)}
        others.append(threading.Thread(target=desk.draw, args=(settings(),), kwargs=asked))
        others[-1].start()
        while len(desk.line) < number:
            time.sleep(0.005)
    list(first)
    for other in others:
        other.join()
    assert told[3][:2] == [
        "waiting for what is being drawn, and 1 more before this",
        "waiting for what is being drawn",
    ]
    assert told[2][0] == "waiting for what is being drawn"


def test_the_samplers_of_a_base_are_known_before_it_is_loaded(results):
    model = ModelConfig(base="tiny-sd15")
    desk = Desk(results, device=CPU)
    assert desk.samplers() == list(SAMPLERS)
    before = desk.samplers(model)
    assert desk.loaded.components is None
    desk.draw(settings(model=model.model_dump()))
    assert desk.samplers(model) == desk.samplers() == before
    with pytest.raises(ConfigError, match="no-such-folder"):
        desk.samplers(ModelConfig(base="no-such-folder/x"))


def test_an_export_makes_room_and_is_the_adapters(desk, results, tmp_path):
    desk.draw(settings())
    file = desk.export(results / "cat", 1, tmp_path / "one.safetensors")
    assert desk.loaded.components is None
    end = desk.export(results / "cat", None, tmp_path / "end.safetensors")
    one, last = (desk.draw(settings(adapters=[{"path": str(path)}])).pictures[0].image for path in (file, end))
    assert apart(one, desk.draw(settings(adapters=[{"path": str(results / "cat"), "step": 1}])).pictures[0].image) <= 1
    assert apart(last, desk.draw(settings(adapters=[{"path": str(results / "cat")}])).pictures[0].image) <= 1
    assert apart(one, last) > 1


def test_what_is_asked_wrongly_is_one_sentence(desk):
    with pytest.raises(ConfigError, match="width 68 is no multiple of 8, which tiny-sdxl draws in: set it to 64 or 72"):
        desk.draw(settings(width=68))
    with pytest.raises(ConfigError, match="no-such-folder"):
        desk.draw(settings(model={"base": "no-such-folder/x"}))
    assert len(desk.draw(settings()).pictures) == 1


def test_a_picture_says_in_its_file_how_it_was_drawn(desk, results, tmp_path):
    from t2ilib.drawing.pngtext import read_picture

    asked = settings(adapters=[{"path": str(results / "cat"), "strength": 0.5}], sampler="Euler a", seed=3)
    (picture,) = desk.draw(asked, beside_base=True).pictures
    path = picture.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00-base.png", "00.png"]
    restored = read_picture(path).settings
    assert restored == picture.settings
    assert len(restored.adapters[0].digest) == 12
    assert apart(desk.draw(restored).pictures[0].image, Image.open(path)) == 0
    base = read_picture(tmp_path / "00-base.png").settings
    assert base == restored.without_adapters()
    assert apart(desk.draw(base).pictures[0].image, Image.open(tmp_path / "00-base.png")) == 0
    assert picture.save(tmp_path).name == "01.png"


def test_what_will_not_fit_is_told_before_it_is_loaded(results, monkeypatch):
    desk = Desk(results, device=CPU)
    monkeypatch.setattr(module, "available_bytes", lambda device: 0.02 * GIB)
    with pytest.raises(
        ConfigError, match=r"drawing 1 picture of 64x64 at once with tiny-sdxl needs 0\.\d GiB of cpu memory, and 0\.0"
    ):
        desk.draw(settings())
    assert desk.loaded.components is None
    monkeypatch.setattr(module, "available_bytes", lambda device: 64 * GIB)
    assert len(desk.draw(settings()).pictures) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_a_sentence_and_the_desk_lives_on(desk, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", raising(error))
        with pytest.raises(
            ConfigError, match=r"ran out of cpu memory \(.*\): draw smaller pictures, set model.quantization to nf4"
        ):
            desk.draw(settings())
    assert len(desk.draw(settings()).pictures) == 1


def test_where_it_can_be_foreseen_it_says_what_would_fit(desk, monkeypatch):
    monkeypatch.setattr(module, "draw", raising(torch.OutOfMemoryError()))
    monkeypatch.setattr("t2ilib.drawing.fit.available_bytes", lambda device: 0.02 * GIB)
    with pytest.raises(
        ConfigError, match=r"drawing 1 picture of 64x64 at once .* are available: even with .*: lower width and height"
    ):
        desk.draw(settings())


def test_other_errors_stay_what_they_are(desk, monkeypatch):
    monkeypatch.setattr(module, "draw", raising(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        desk.draw(settings())
    assert not desk.busy


def raising(error):
    def fails(*arguments, **options):
        raise error

    return fails
