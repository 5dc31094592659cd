"""How the variants of a study were tuned, from tuning.json: a table, a U for each, and which was ahead after how many hours.

A study's folder of tuned values has a copy of that file, so that a report of it can be made from the folder alone. Says nothing about whether
a lead is more than noise: trials have one seed, as a rule, and the best of several is an optimist. That is for the final runs to say.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from t2ilib.config import ConfigError
from t2ilib.evaluation.metrics import Metric
from t2ilib.report.contents import StudyReport
from t2ilib.report.figures import COLORS, LINE_STYLES, Plot
from t2ilib.report.labels import folded, label_ends
from t2ilib.report.tables import NOT_MEASURED, markdown_table, write_number
from t2ilib.statistics.expected import Curve, expected_best, leading
from t2ilib.studies.tuned import TRIALS

ENDED = ("scored", "diverged", "given up")
PANELS = 4
"""In a row of the figure of values."""
CLASSES = {
    "tuned": "searched, each with the same budget",
    "tunes itself": "a class of its own: its optimizer finds its step size, so nothing of it was searched",
    "as it is": "nothing of it was searched",
}


@dataclass(frozen=True)
class Tuning:
    """tuning.json. `variants`: name -> title, class, search, trials, best, at_end, ended; `order`: all of the study's, which have their colours
    by it."""

    study: str
    preset: str
    metric: Metric
    budget: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    order: Sequence[str]

    @property
    def sign(self) -> int:
        return -1 if self.metric.better == "lower" else 1

    def best(self, name: str) -> Mapping[str, Any] | None:
        number = self.variants[name]["best"]
        return None if number is None else next(t for t in self.variants[name]["trials"] if t["number"] == number)

    def scored(self, name: str) -> list[Mapping[str, Any]]:
        return [trial for trial in self.variants[name]["trials"] if trial["state"] == "scored"]

    def hours(self, name: str) -> float:
        return sum(trial["seconds"] for trial in self.variants[name]["trials"]) / 3600

    def of_class(self, kind: str) -> list[str]:
        return [name for name, told in self.variants.items() if told["class"] == kind]

    def style(self, name: str) -> tuple[str, str]:
        index = self.order.index(name)
        return COLORS[index % len(COLORS)], LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)]

    def curve(self, name: str) -> Curve | None:
        """Expected gain over hours; None where nothing was scored. A trial that diverged counts as the lowest gain that any had."""
        done = [t for t in self.variants[name]["trials"] if t["state"] in ("scored", "diverged")]
        every = [self.sign * trial["score"] for other in self.variants for trial in self.scored(other)]
        hours = self.hours(name) / len(done) if done else 0.0
        if not self.scored(name) or not hours:
            return None
        gains = [self.sign * trial["score"] if trial["state"] == "scored" else min(every) for trial in done]
        return Curve(hours, tuple(expected_best(gains)))


def load_tuning(folder: Path | str) -> Tuning | None:
    """What lies in a folder's tuning.json; None where it has none, or no trial was scored yet. Raises ConfigError for a file that is not what
    it should be."""
    file = Path(folder) / TRIALS
    return read_tuning(file.read_text(), str(file)) if file.exists() else None


def tuning_of(report: StudyReport) -> Tuning | None:
    """How the variants of a report were tuned; None where they were not."""
    text = report.beside.get(TRIALS)
    return read_tuning(text, str(report.folder / TRIALS)) if text else None


def read_tuning(text: str, file: str) -> Tuning | None:
    """What a tuning.json says; `file`: what errors call it."""
    try:
        told = json.loads(text)
        if told["score"] is None:
            return None
        return Tuning(
            told["study"],
            told["preset"],
            Metric(**told["score"]),
            told["budget"],
            told["variants"],
            told["order"],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not what `t2ilib study tune` writes ({error}): tune again") from None


def tuning_table(tuning: Tuning) -> list[dict[str, str]]:
    """A row a variant: the values that are best for it, their score, what that took, and how its search ended."""
    rows = []
    for name, told in tuning.variants.items():
        best, trials = tuning.best(name), told["trials"]
        diverged = sum(trial["state"] == "diverged" for trial in trials)
        rows.append(
            {
                "variant": name,
                "class": told["class"],
                "best values": write_values(best["values"]) if best else NOT_MEASURED,
                tuning.metric.title: write_score(best["score"], tuning.metric) if best else NOT_MEASURED,
                "trials": f"{len(trials)}{f' ({diverged} diverged)' * bool(diverged)}",
                "hours": f"{tuning.hours(name):.2g}",
                "search": told["ended"] or "not ended",
                "best inside": write_ends(told),
            }
        )
    return rows


def write_values(values: Mapping[str, Any]) -> str:
    told = [f"{name.split('.')[-1]} {write_value(value)}" for name, value in values.items()]
    return ", ".join(told) or "as the study says"


def write_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_score(score: float, metric: Metric) -> str:
    """Nobody knows how large a formula's numbers are."""
    return f"{score:.4g}" if metric.unit == "score" else write_number(score, metric)


def write_hours(hours: float) -> str:
    return f"{hours:.2g} h" if hours >= 0.5 else f"{60 * hours:.2g} min"


def write_ends(told: Mapping[str, Any]) -> str:
    """Whether the best value lies inside what was tried, field by field where it does not."""
    if not told["search"]:
        return ""
    return ", ".join(f"no: {name.split('.')[-1]} at its {end} end" for name, end in told["at_end"].items()) or "yes"


def tuning_markdown(tuning: Tuning | None) -> str:
    """The section of a report about tuning, with its own heading; "" where nothing was tuned."""
    if tuning is None:
        return ""
    budget = tuning.budget
    hours = f" or {budget['hours']:g} h" if budget["hours"] else ""
    many = len(budget["seeds"]) > 1
    head = (
        f"Before the seeds of the preset *{tuning.preset}* were spent, each variant searched its own best values by whole runs, with the"
        f" same budget: {budget['trials']} trials{hours}, scored by {tuning.metric.title}, on pictures and prompts that the runs of this"
        f" report never see, with seed{'s' * many} {', '.join(map(str, budget['seeds']))}. A range at whose end the best value lay was"
        f" extended by a factor of 3, at most {budget['extensions']} times, beyond the {budget['trials']} trials too. Scores of the best trial"
        f" flatter it; only the final runs compare. No trial was stopped early."
    )
    parts = [
        "## Tuning",
        head,
        markdown_table(tuning_table(tuning)),
        "\n".join(f"- {line}" for line in remarks(tuning)),
        "\n".join(f"- {line}" for line in sentences(tuning)),
        "<details><summary>All trials</summary>\n\n" + markdown_table(trials_table(tuning)) + "\n\n</details>",
    ]
    return "\n\n".join(part for part in parts if part)


def remarks(tuning: Tuning) -> list[str]:
    """What a reader should know of these searches."""
    lines = []
    for name, told in tuning.variants.items():
        title, trials = told["title"], told["trials"]
        for address, end in told["at_end"].items():
            lines.append(
                f"{title}: its best {address} is the {'lowest' if end == 'low' else 'highest'} that was tried, so a better one may lie"
                " beyond, and it may be worth more than is shown."
            )
        if lost := [trial for trial in trials if trial["state"] == "given up"]:
            lines.append(
                f"{title}: {len(lost)} trial(s) failed and were given up: {write_values(lost[0]['values'])}{' and others' * (len(lost) > 1)}."
            )
        if diverged := [trial for trial in trials if trial["state"] == "diverged"]:
            values = "; ".join(write_values(trial["values"]) for trial in diverged)
            lines.append(f"{title}: training diverged at {values}, which counts as worse than all else.")
        if told["ended"] is None:
            lines.append(f"{title}: its search has not ended.")
        scores = {trial["score"] for trial in tuning.scored(name)}
        if told["search"] and len(scores) == 1 and len(trials) > 1:
            lines.append(f"{title}: all its trials scored the same, so what is called best is merely the middle one.")
    for kind in ("tunes itself", "as it is"):
        if names := tuning.of_class(kind):
            lines.append(f"{', '.join(tuning.variants[name]['title'] for name in names)}: {CLASSES[kind]}.")
    return lines


def sentences(tuning: Tuning) -> list[str]:
    """Who is ahead from when on: the variant that ends highest against every other of its class, and against those that tune themselves."""
    curves = {name: curve for name in tuning.variants if (curve := tuning.curve(name))}
    tuned = [name for name in tuning.of_class("tuned") if name in curves]
    if not tuned:
        return []
    top = max(tuned, key=lambda name: curves[name].best[-1])
    title = {name: told["title"] for name, told in tuning.variants.items()}
    lines = []
    for other in tuned:
        if other != top and (told := write_lead(title[top], title[other], curves[top], curves[other])):
            lines.append(told)
    for other in tuning.of_class("tunes itself"):
        if other in curves and (told := against_one(title[top], title[other], curves[top], curves[other])):
            lines.append(told)
    return lines


def write_lead(first: str, second: str, a: Curve, b: Curve) -> str:
    lead = leading(a, b)
    if lead is None:
        return (
            f"{first} and {second} cannot be compared by hours: one had all its trials before the other had its first."
        )
    names = {1: (first, second), -1: (second, first)}
    if lead.sign == 0:
        return f"{first} and {second} are level after {write_hours(lead.ends)}."
    ahead, behind = names[lead.sign]
    if lead.crossings:
        at = ", ".join(f"{write_hours(time)}" for time in lead.crossings)
        return f"{first} and {second} cross at {at}; {ahead} leads from {write_hours(lead.since)} on."
    return f"{ahead} leads {behind} from {write_hours(lead.since)} of tuning on{', as soon as both have a trial' * (lead.since == lead.begins)}."


def against_one(first: str, second: str, a: Curve, b: Curve) -> str:
    """The searched variant against one that takes a single run."""
    level = b.best[-1]
    times = [a.hours * (k + 1) for k, value in enumerate(a.best) if value > level]
    takes = f"{second}, which tunes itself, takes {write_hours(b.hours)}"
    if not times:
        return f"{takes}, and {first} is not expected to be ahead of it within the {write_hours(a.ends)} of its search."
    return f"{takes}; {first} is expected to be ahead of it once {write_hours(times[0])} are searched."


def trials_table(tuning: Tuning) -> list[dict[str, str]]:
    rows = []
    for name, told in tuning.variants.items():
        for trial in told["trials"]:
            score = trial["score"]
            row = {"variant": name, "trial": str(trial["number"]), "values": write_values(trial["values"])}
            row[tuning.metric.title] = trial["state"] if score is None else write_score(score, tuning.metric)
            row["minutes"] = f"{trial['seconds'] / 60:.1f}"
            rows.append(row)
    return rows


def tuning_figures(tuning: Tuning | None) -> list[Plot]:
    """Score against value, and expected best against hours; [] where nothing was tuned."""
    if tuning is None:
        return []
    told = (
        (
            "Each at its own best",
            "Each panel is a variant, each point a whole run at that value, on seeds and pictures of its own; the ring is the value that its"
            " final runs have, a cross a training that diverged. A U that is open at one side has its best value beyond.",
            "Score against the value that was searched",
            "tuning_values.png",
            plot_values(tuning),
        ),
        (
            "What tuning takes",
            "The best score that so many hours of trials are expected to give, had they been made in any order (arXiv 2004.13705). Dashed: what"
            " tunes itself, by one run. One seed a trial: lines that lie close say nothing.",
            "Expected best score against hours of tuning",
            "tuning_hours.png",
            plot_hours(tuning),
        ),
    )
    return [Plot(*words, figure) for *words, figure in told if figure is not None]


def grid_field(told: Mapping[str, Any]) -> str | None:
    """The field that a variant's panel shows: the first that goes by ratios, or else its first range."""
    ranges = {name: field for name, field in told["search"].items() if "choices" not in field}
    return next(iter(sorted(ranges, key=lambda name: not ranges[name].get("log"))), None)


def plot_values(tuning: Tuning) -> Figure | None:
    """A panel a variant whose range was searched; None where none was."""
    shown = {
        name: field for name, told in tuning.variants.items() if (field := grid_field(told)) and tuning.scored(name)
    }
    if not shown:
        return None
    columns = min(PANELS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.5 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (name, field) in zip(grid.flat, shown.items(), strict=False):
        draw_values(axes, tuning, name, field)
    for row in grid:
        row[0].set_ylabel(folded(tuning.metric.title), fontsize=8)
    if tuning.metric.better == "lower":
        grid[0, 0].invert_yaxis()
    return figure


def draw_values(axes: Axes, tuning: Tuning, name: str, field: str) -> None:
    color, _ = tuning.style(name)
    points = sorted((trial["values"][field], trial["score"]) for trial in tuning.scored(name))
    alone = len(tuning.variants[name]["search"]) == 1
    axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=1.4 if alone else 0)
    lost = [t["values"][field] for t in tuning.variants[name]["trials"] if t["state"] == "diverged"]
    worst = min(points, key=lambda point: tuning.sign * point[1])[1]
    axes.plot(lost, [worst] * len(lost), color=color, marker="x", linewidth=0)
    best = tuning.best(name)
    axes.plot([best["values"][field]], [best["score"]], marker="o", markersize=11, color=color, fillstyle="none")
    if tuning.variants[name]["search"][field].get("log"):
        axes.set_xscale("log")
    axes.set_title(folded(name), fontsize=9, color=color)
    axes.set_xlabel(field.split(".")[-1], fontsize=8)
    axes.tick_params(labelsize=7)
    dress_score(axes, tuning)


def dress_score(axes: Axes, tuning: Tuning) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.1, 0.15)
    if tuning.metric.unit == "share":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def plot_hours(tuning: Tuning) -> Figure | None:
    """None where no search took any time."""
    curves = {name: curve for name in tuning.variants if (curve := tuning.curve(name))}
    if not any(name in curves for name in tuning.of_class("tuned")):
        return None
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="hours of tuning", ylabel=f"expected best {tuning.metric.title}")
    ends, last = [], max(curve.ends for curve in curves.values())
    for name, curve in curves.items():
        color, line = tuning.style(name)
        values = [tuning.sign * gain for gain in curve.best]
        if tuning.variants[name]["class"] == "tuned":
            hours = [curve.hours * (k + 1) for k in range(len(values))]
            axes.step(
                [*hours, curve.ends],
                [*values, values[-1]],
                where="post",
                color=color,
                linestyle=line,
                marker="o",
                markersize=3,
            )
            ends.append((curve.ends, values[-1], name, color))
        else:
            axes.plot([curve.hours, last], [values[-1]] * 2, color=color, linestyle="--", linewidth=1)
            ends.append((last, values[-1], name, color))
    dress_score(axes, tuning)
    if tuning.metric.better == "lower":
        axes.invert_yaxis()
    label_ends(axes, ends)
    return figure
