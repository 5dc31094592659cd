"""What a notebook shows while a run trains, in place: how far it is, the numbers that matter, the losses, the latest samples.

It is told what every tracker is told, so a resumed run shows its whole curve. Each part is one output that is replaced (IPython's display
handles, which JupyterLab, VS Code, Colab and Kaggle know), not a widget: a saved notebook holds what was shown last, as plain text and two
pictures, and nothing of before. Showing takes SHARE of a run's time at the most, because what took long to draw is drawn again later.
"""

import io
import time
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from t2ilib.config import RunConfig
from t2ilib.memory import MIB, process_peak_mib
from t2ilib.tracking.tracker import NullTracker

if TYPE_CHECKING:
    from PIL.Image import Image

SHARE = 0.0075
"""Of the time, for each of the two parts that are drawn again: what took 75 ms is left for ten seconds."""
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_CURVES = 0.5, 2.0
"""At the least."""
AXES = (0.09, 0.2, 0.89, 0.76)
"""Of the figure: left, bottom, width, height. Having them found takes as long as drawing."""
MOST_POINTS = 400
"""Of a curve: more lie within one pixel's width of each other."""
WIDTH_INCHES, HEIGHT_INCHES, DOTS = 7.5, 2.6, 90
QUALITY = 85
"""Of the samples' JPEG: what is shown is a glance, the pictures themselves are in the run's folder."""
WIDEST = 1100
"""Pixels of the samples' grid."""


class Part:
    """An output of the cell that is replaced. `least`: seconds between two of its states."""

    def __init__(self, least: float):
        self.least, self.handle, self.next = least, None, 0.0

    def show(self, make: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Shows what `make` gives, by MIME type, if it is time, or `now`."""
        began = time.monotonic()
        if began < self.next and not now:
            return
        from IPython.display import display

        content = make()
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)
        took = time.monotonic() - began
        self.next = began + took + max(self.least, took / SHARE)


class Panel(NullTracker):
    """`live`: shows while it is told. Otherwise only at the end, where nobody looks on before."""

    def __init__(self, run: RunConfig, live: bool = True):
        self.run, self.live = run, live
        self.losses: dict[int, float] = {}
        self.held_out: dict[int, float] = {}
        self.values: dict[str, float] = {}
        self.step, self.first, self.begun, self.seconds, self.peak = 0, None, 0.0, 0.0, 0.0
        self.samples: tuple[int, Image] | None = None
        self.status, self.curve, self.drawn = Part(SECONDS_BETWEEN_LINES), Part(SECONDS_BETWEEN_CURVES), Part(0.0)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.step, self.values = step, self.values | values
        if "loss" in values:
            self.losses[step] = values["loss"]
        if "held_out_loss" in values:
            self.held_out[step] = values["held_out_loss"]
        if self.live and self.first is not None:
            self.status.show(self.told)
            self.curve.show(self.plotted)

    def log_image(self, image: "Image", key: str, step: int) -> None:
        if key == "samples":
            self.samples = (step, image)
            if self.live:
                self.status.show(self.told, now=self.status.handle is None)
                self.curve.show(self.plotted, now=self.curve.handle is None)
                self.drawn.show(self.pictured, now=True)

    def progress(self, step: int, seconds: float) -> None:
        """After a step of this start, with the seconds that steps took, by earlier starts too; the first of a start is not timed."""
        if self.first is None:
            self.first, self.begun = step, seconds
        self.step, self.seconds = step, seconds - self.begun
        if step == self.run.training.steps or step == self.first:
            self.status.next = self.curve.next = 0.0

    def end(self, error: BaseException | None = None) -> None:
        """The last state: in words, without a bar. `error`: what ended the run."""
        if self.first is None and not self.live:
            return
        self.status.show(lambda: {"text/plain": self.ended(error)}, now=True)
        if self.losses or self.held_out:
            self.curve.show(self.plotted, now=True)

    @property
    def pace(self) -> float | None:
        """Steps a second in this start."""
        done = self.step - self.first if self.first is not None else 0
        return done / self.seconds if done > 0 and self.seconds > 0 else None

    def numbers(self) -> dict[str, str]:
        """Title -> what matters, as text."""
        told = {}
        if self.losses:
            recent = list(self.losses.values())[-window(self.losses) :]
            told["loss"] = f"{sum(recent) / len(recent):.4f}"
        if self.held_out:
            start, last = next(iter(self.held_out.values())), list(self.held_out.values())[-1]
            told["held-out loss"] = f"{last:.4f} (at first {start:.4f})" if len(self.held_out) > 1 else f"{last:.4f}"
        rates = [value for name, value in self.values.items() if name.startswith("learning_rate")]
        told |= {"learning rate": f"{rates[0]:.2e}"} if rates else {}
        told |= {"speed": f"{self.pace:.2f} steps/s"} if self.pace else {}
        if (waited := self.values.get("data_wait_share", 0.0)) > 0.05:
            told["waiting for data"] = f"{waited:.0%}"
        return told | {"peak memory": self.memory()}

    def memory(self) -> str:
        import torch

        if torch.cuda.is_available():
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() / MIB)
            return f"{self.peak:,.0f} MiB (GPU)"
        self.peak = max(self.peak, process_peak_mib())
        return f"{self.peak:,.0f} MiB"

    def told(self) -> dict[str, str]:
        steps = self.run.training.steps
        share = self.step / steps if steps else 1.0
        head = f"step {self.step} of {steps}" if steps else "measuring the base"
        if self.pace and self.step < steps:
            head += f", {clock((steps - self.step) / self.pace)} to go"
        return {
            "text/html": page(self.run.name, head, share, self.numbers()),
            "text/plain": words(head, self.numbers()),
        }

    def ended(self, error: BaseException | None) -> str:
        steps = self.run.training.steps
        if error is None:
            numbers = {title: text for title, text in self.numbers().items() if title != "learning rate"}
            return words(f"{self.run.name}: done, {steps} steps", numbers)
        why = " ".join(str(error).split())[:300] or type(error).__name__
        goes_on = ". Run this cell again, and it goes on from its last checkpoint" if self.losses else ""
        return words(f"{self.run.name}: ended at step {self.step} of {steps} ({why}){goes_on}", self.numbers())

    def plotted(self) -> dict[str, Any]:
        """The losses; as PNG, which needs no matplotlib backend in the kernel."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS)
        axes = figure.add_axes(AXES, xlabel="step", ylabel="loss")
        if self.losses:
            smooth = smoothed(self.losses)
            axes.plot(*points(self.losses), color="0.8", linewidth=0.8, label="loss of single steps")
            axes.plot(*points(smooth), color="tab:blue", label=f"mean of {window(self.losses)}")
            axes.set_ylim(*limits([*smooth.values(), *self.held_out.values()]))
        if self.held_out:
            axes.plot(*points(self.held_out), "o-", color="tab:orange", markersize=4, label="held-out loss")
        axes.set_xlim(0, max(self.run.training.steps, 1))
        if axes.lines:
            axes.legend(loc="upper right", fontsize=8, framealpha=0.8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        return as_bundle(stream.getvalue(), "image/png", "the losses by step")

    def pictured(self) -> dict[str, Any]:
        step, grid = self.samples
        shrink = min(1.0, WIDEST / grid.width)
        if shrink < 1:
            grid = grid.resize((WIDEST, round(grid.height * shrink)))
        stream = io.BytesIO()
        grid.convert("RGB").save(stream, format="JPEG", quality=QUALITY)
        return as_bundle(stream.getvalue(), "image/jpeg", f"samples at step {step}")


def window(losses: Mapping[int, float]) -> int:
    """How many losses one point of the smooth curve is the mean of."""
    return max(1, len(losses) // 20)


def smoothed(losses: Mapping[int, float]) -> dict[int, float]:
    size, sums = window(losses), [0.0]
    for loss in losses.values():
        sums.append(sums[-1] + loss)
    return {step: (sums[i + 1] - sums[max(0, i + 1 - size)]) / min(i + 1, size) for i, step in enumerate(losses)}


def points(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """Steps and values, MOST_POINTS of them and the last at the most."""
    items = list(values.items())
    every = -(-len(items) // MOST_POINTS)
    kept = items[::every] if (len(items) - 1) % every == 0 else [*items[::every], items[-1]]
    return [step for step, _ in kept], [value for _, value in kept]


def limits(values: list[float]) -> tuple[float, float]:
    """Of the losses' axis, with room: single steps may lie beyond."""
    low, high = min(values), max(values)
    room = 0.35 * (high - low) or 0.1 * abs(high) or 1.0
    return max(0.0, low - room), high + room


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def words(head: str, numbers: Mapping[str, str]) -> str:
    width = max(map(len, numbers), default=0)
    return "\n".join([head, *(f"  {title:{width}s}  {text}" for title, text in numbers.items())])


def page(name: str, head: str, share: float, numbers: Mapping[str, str]) -> str:
    """A bar with a line above it and the numbers below, in the colours of whatever page it stands on."""
    cells = "".join(
        f'<span style="display: inline-block; margin: 6px 24px 0 0"><span style="opacity: 0.65">{escape(title)}</span><br>'
        f'<b style="font-variant-numeric: tabular-nums">{escape(text)}</b></span>'
        for title, text in numbers.items()
    )
    return (
        f'<div style="font-family: sans-serif; font-size: 13px; max-width: 760px"><b>{escape(name)}</b>&ensp;{escape(head)}'
        '<div style="height: 8px; margin-top: 6px; border-radius: 4px; background: rgba(128, 128, 128, 0.25)">'
        f'<div style="height: 8px; width: {100 * min(share, 1):.1f}%; border-radius: 4px; background: #3366cc"></div></div>{cells}</div>'
    )


def as_bundle(data: bytes, kind: str, about: str) -> dict[str, Any]:
    """What a notebook takes for a picture: base64 by MIME type, and words for programs that show none."""
    import base64

    return {kind: base64.b64encode(data).decode(), "text/plain": f"<{about}>"}
