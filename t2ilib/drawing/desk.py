"""The desk: where pictures are drawn as a person asks for them, one request at a time.

    desk = Desk()
    drawing = desk.draw(DrawSettings(prompt="a red heart", num_pictures=4, adapters=(AdapterChoice(path="results/cat"),)))
    for picture in drawing.pictures:
        picture.save(Path("pictures"))

It holds one base with its adapters (`loaded`), draws with the addressed noise that everything here draws with, tells how far it is, shows
what the network expects to come, and stops between two calls of it. Whoever asks while it draws waits for their turn.
"""

import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from t2ilib.adapters.export import export_adapter
from t2ilib.config import ConfigError, EvaluationConfig, ModelConfig
from t2ilib.drawing.checkpoints import export_step
from t2ilib.drawing.fit import bytes_held, memory_told, shortage
from t2ilib.drawing.loaded import Loaded
from t2ilib.drawing.pngtext import texts_of
from t2ilib.drawing.samplers import SAMPLERS, build_sampler, name_of, samplers_for
from t2ilib.drawing.settings import DrawSettings, require_size
from t2ilib.drawing.turns import Line
from t2ilib.evaluation.sampling import draw, free_path, save_png
from t2ilib.evaluation.watching import Call
from t2ilib.memory import pictures_at_once
from t2ilib.models.components import Components
from t2ilib.models.load import choose_device
from t2ilib.planning.fit import available_bytes
from t2ilib.planning.unloaded import build_unloaded, native_resolution

BATCH = 32
"""Pictures drawn at once, at the most; a megapixel of them otherwise, at least one."""
PREVIEW_LATENTS = 64
"""Latents along the longer side of a preview, at the most: half the side of SDXL's pictures, a quarter of the time."""
Stop = threading.Event | Callable[[], bool]


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn. `settings`: of it alone, so that drawing them gives it again; `sampler`, `size` (width, height): what "auto"
    and None were; `base`: where it was asked for, what the base alone draws from the same noise, by `base_sampler` and `base_settings`."""

    image: Image.Image
    settings: DrawSettings
    sampler: str
    size: tuple[int, int]
    base: Image.Image | None = None
    base_sampler: str = ""
    base_settings: DrawSettings | None = None

    def texts(self) -> dict[str, str]:
        """What its file says of it (`pngtext`)."""
        return texts_of(self.settings, self.sampler, self.size)

    def save(self, folder: Path | str) -> Path:
        """Writes it into `folder` behind the numbers that are there, with its settings, and where there is one the base's picture beside it
        (`00.png`, `00-base.png`); returns its path."""
        path = free_path(Path(folder))
        if self.base is not None:
            told = texts_of(self.base_settings, self.base_sampler, self.size)
            save_png(self.base, path.with_stem(f"{path.stem}-base"), told)
        save_png(self.image, path, self.texts())
        return path


@dataclass(frozen=True)
class Drawing:
    """All that was drawn, in the order that it was asked for; where it was `stopped`, only what was whole by then."""

    pictures: tuple[Picture, ...]
    stopped: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a drawing is. `doing`: in words, such as "loading tiny-sdxl"; `done` of `total` pictures are whole, and `share` of all work is
    done, from 0 to 1; `step` of `num_steps` of the batch that is being drawn, 0 while nothing is.

    `previews`: where they are due, the pictures of this batch as the network expects them now, smaller than they will be; `finished`: pictures
    that have become whole since the last was told.
    """

    doing: str
    done: int
    total: int
    share: float
    step: int = 0
    num_steps: int = 0
    previews: tuple[Image.Image, ...] = ()
    finished: tuple[Picture, ...] = ()


Watch = Callable[[Progress], None]


class Stopped(Exception):
    """Somebody asked the drawing to stop."""


class Desk:
    """Draws by `DrawSettings`. `results`, `uri`: where `models:/...` is looked up (`finding.resolve`). `device`: None for the GPU, where
    there is one.

    `loaded`: what lies in memory; `loaded.words` tells what words of embeddings files are called in prompts.
    """

    def __init__(self, results: Path = Path("results"), uri: str | None = None, device: torch.device | None = None):
        self.device = device or choose_device()
        self.loaded = Loaded(self.device, Path(results), uri)
        self.line = Line()
        self.foreseen: set[tuple] = set()

    @property
    def busy(self) -> bool:
        """Whether something is being drawn."""
        return len(self.line) > 0

    def close(self) -> None:
        """Gives back all memory, once what is being drawn is done. The desk can be used again."""
        with self.line.turn():
            self.loaded.drop()

    def export(self, run: Path, step: int | None, target: Path, format: str = "diffusers", **options: Any) -> Path:
        """`checkpoints.export_step` (`step` None: `adapters.export.export_adapter`, of the end), when it is this desk's turn: it loads a base of
        its own, for which the desk's makes room."""
        with self.line.turn():
            self.loaded.drop()
            if step is None:
                return export_adapter(run, target, format, **options)
            return export_step(run, step, target, format, **options)

    def samplers(self, model: ModelConfig | None = None) -> list[str]:
        """The samplers that can draw for a base, of which config files only are read; without one for what is loaded, and all where nothing is.
        Raises ConfigError for what is no base."""
        loaded = self.loaded.components if model in (None, self.loaded.model) else None
        if loaded is None and model is None:
            return list(SAMPLERS)
        return samplers_for((loaded or build_unloaded(model, torch.float32)).scheduler)

    def size_of(self, settings: DrawSettings) -> tuple[int, int]:
        """Width and height of the pictures, in pixels: the base's own side where none is said. Reads config files only."""
        if settings.width and settings.height:
            return settings.width, settings.height
        there = self.loaded.components if self.loaded.model == settings.model else None
        side = there.native_side if there else native_resolution(settings.model)
        return settings.width or side, settings.height or side

    def draw(
        self,
        settings: DrawSettings | Sequence[DrawSettings],
        *,
        beside_base: bool = False,
        watch: Watch | None = None,
        stop: Stop | None = None,
        preview_every: int = 0,
        batch_size: int = BATCH,
    ) -> Drawing:
        """Draws all pictures of the settings, in order; what follows one another and differs by prompt and noise alone, at once.

        `beside_base`: draws the base alone too, from the same noise. `watch`: is told how far it is, in this thread, with previews every so
        many steps of `preview_every` (0: none). `stop`: an event, or what says whether to stop, asked between two calls of the network.
        Raises ConfigError for all that cannot be loaded, found, drawn, or does not fit into memory; the desk can draw other settings then.
        """
        listed = [settings] if isinstance(settings, DrawSettings) else list(settings)
        pictures = [single for each in listed for single in each.pictures()]
        course = Course(len(pictures), 1 + beside_base, watch or (lambda progress: None), asked(stop), preview_every)
        try:
            with self.line.turn(course.wait):
                for _, group in itertools.groupby(pictures, key=kind_of):
                    self.draw_alike(list(group), beside_base, course, batch_size)
        except Stopped:
            return Drawing(tuple(course.drawn), stopped=True)
        return Drawing(tuple(course.drawn))

    def stream(self, settings: DrawSettings | Sequence[DrawSettings], **options: Any) -> Iterator[Progress | Drawing]:
        """`draw`, in a thread of its own, as what `watch` would be told, and last the `Drawing`. Takes its options, but for `watch`; raises what
        it raises. Leaving off (closing the iterator) stops the drawing."""
        events: queue.SimpleQueue = queue.SimpleQueue()
        left, wanted = threading.Event(), asked(options.pop("stop", None))

        def work() -> None:
            try:
                events.put(self.draw(settings, watch=events.put, stop=lambda: left.is_set() or wanted(), **options))
            except BaseException as error:  # is raised where it is waited for
                events.put(error)

        thread = threading.Thread(target=work, name="drawing", daemon=True)
        thread.start()
        try:
            event = None
            while not isinstance(event, Drawing):
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            left.set()
            thread.join()

    def draw_alike(self, pictures: list[DrawSettings], beside_base: bool, course: "Course", batch_size: int) -> None:
        """Draws pictures that differ by prompt and noise alone."""
        settings, size = pictures[0], self.size_of(pictures[0])
        at_once = pictures_at_once(math.ceil(math.sqrt(math.prod(size))), min(batch_size, len(pictures)))
        course.require_wanted()
        if settings.model != self.loaded.model:
            course.tell(f"loading {settings.model.base}")
        self.require_room(settings, size, at_once, course)
        with memory_told(settings, size, at_once, self.device):
            components = self.loaded.take(settings)
        require_size(
            *size, components.vae_scale if components.family.has_vae else components.side_multiple, components.path
        )
        asked, told = pictures, self.loaded.told(settings)
        pictures = [one.settled(components.drawn_by) for one in asked]
        sampler, name = self.sampler(pictures[0])
        for start in range(0, len(pictures), at_once):
            part = pictures[start : start + at_once]
            with memory_told(settings, size, len(part), self.device):
                images = draw_part(components, part, size, sampler, course, "drawing")
                bases, base_name, of_base = [None] * len(part), "", [None] * len(part)
                if beside_base and not settings.adapters:
                    bases, base_name, of_base = images, name, part
                    course.worked += len(part)
                elif beside_base:
                    with self.loaded.without_adapters(settings.adapters):
                        alone = asked[start : start + at_once]
                        of_base = [one.without_adapters().settled(components.drawn_by) for one in alone]
                        own, base_name = self.sampler(of_base[0])
                        bases = draw_part(components, of_base, size, own, course, "drawing the base alone")
            finished = [
                Picture(image, one.model_copy(update={"adapters": told}), name, size, base, base_name, so)
                for image, base, one, so in zip(images, bases, part, of_base, strict=True)
            ]
            course.finish(finished)

    def sampler(self, settings: DrawSettings) -> tuple[Any, str]:
        """What draws for the components as they are now, and its name. Raises ConfigError for more steps than it can take."""
        sampler = build_sampler(self.loaded.components.scheduler, settings.sampler)
        try:
            sampler.set_timesteps(settings.num_inference_steps)
        except ValueError as error:
            name, reason = name_of(sampler), " ".join(str(error).split())
            raise ConfigError(
                f"sampler {name} cannot draw in {settings.num_inference_steps} steps: take fewer, or another sampler ({reason})"
            ) from None
        return sampler, name_of(sampler)

    def require_room(self, settings: DrawSettings, size: tuple[int, int], at_once: int, course: "Course") -> None:
        """Raises ConfigError on a CPU, where nothing else would be told, for what will not fit into its memory."""
        known = (settings.model, size, at_once, settings.vae_tiling)
        if self.device.type != "cpu" or known in self.foreseen:
            return
        course.tell("looking whether it fits into memory")
        components = self.loaded.components
        held = bytes_held([*components.modules().values(), components.vae]) if components else 0
        if told := shortage(settings, size, at_once, self.device, available_bytes(self.device) + held):
            raise ConfigError(told)
        self.foreseen.add(known)


class Course:
    """What is told of a drawing while it goes on, and what it has come to."""

    def __init__(self, total: int, passes: int, watch: Watch, stop: Callable[[], bool], preview_every: int):
        self.total, self.passes, self.watch, self.stop, self.preview_every = total, passes, watch, stop, preview_every
        self.drawn: list[Picture] = []
        self.before = 0
        self.worked = 0.0
        """Pictures' worth of passes that are done."""

    def require_wanted(self) -> None:
        if self.stop():
            raise Stopped

    def wait(self, before: int) -> None:
        """Is told how many drawings are before this one."""
        self.require_wanted()
        if before != self.before:
            self.before = before
            self.tell(f"waiting for what is being drawn{f', and {before - 1} more before this' if before > 1 else ''}")

    def tell(self, doing: str, begun: float = 0.0, **more: Any) -> None:
        """`begun`: pictures' worth of the pass that is going on."""
        share = min(1.0, (self.worked + begun) / max(1, self.total * self.passes))
        self.watch(Progress(doing, len(self.drawn), self.total, share, **more))

    def finish(self, pictures: list[Picture]) -> None:
        self.drawn += pictures
        self.tell("done" if len(self.drawn) == self.total else "drawing", finished=tuple(pictures))


def draw_part(
    components: Components, part: list[DrawSettings], size: tuple[int, int], sampler: Any, course: Course, doing: str
) -> list[Image.Image]:
    """Draws settings that fit one batch; raises Stopped between two calls of the network."""
    settings, told = part[0], 0

    def look(call: Call) -> None:
        nonlocal told
        course.require_wanted()
        step = -(-call.number * settings.num_inference_steps // call.count)
        if step == told:  # of samplers that ask more often than once a step
            return
        due = course.preview_every and step % course.preview_every == 0 and step < settings.num_inference_steps
        previews = preview(components, call.predict()) if due else ()
        told = step
        begun = len(part) * call.number / call.count
        course.tell(doing, begun, step=step, num_steps=settings.num_inference_steps, previews=previews)

    images = draw(
        components,
        [one.prompt for one in part],
        EvaluationConfig(
            negative_prompt=settings.negative_prompt,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            vae_tiling=settings.vae_tiling,
        ),
        batch_size=len(part),
        size=size,
        noise=[(one.seed, one.first) for one in part],
        scheduler=sampler,
        look=look,
    )
    course.worked += len(part)
    return images


def preview(components: Components, latents: torch.Tensor) -> tuple[Image.Image, ...]:
    """Predicted pictures of latents (B, C, h, w), made of fewer of them where there are many."""
    shrink = max(latents.shape[-2:]) / PREVIEW_LATENTS
    if shrink > 1:
        latents = F.interpolate(latents, scale_factor=1 / shrink, mode="area")
    pixels = components.decode_latents(latents).float().cpu()
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return tuple(Image.fromarray(picture.numpy()) for picture in levels)


def kind_of(settings: DrawSettings) -> DrawSettings:
    """What pictures that are drawn at once have in common."""
    return settings.model_copy(update={"prompt": "", "seed": 0, "first": 0})


def asked(stop: Stop | None) -> Callable[[], bool]:
    if stop is None:
        return lambda: False
    return stop.is_set if isinstance(stop, threading.Event) else stop
