"""What a reader must know before believing the tables: missing runs, too few seeds, what no run varied, what a CPU
cannot tell."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t2ilib.config import ModelConfig, PriorConfig, ShapesConfig, did_you_mean
from t2ilib.data.dataset import FEW_HELD_OUT, NAMED
from t2ilib.planning.bound import SHIPPED
from t2ilib.report.contents import StudyReport
from t2ilib.report.noise import told_noise
from t2ilib.report.trust import flags, weak
from t2ilib.statistics.signs import smallest_p

SEEDS_TO_DECIDE = next(n for n in range(2, 64) if smallest_p(n) < 0.05)


def caveats(report: StudyReport) -> list[str]:
    """What a reader must know before believing the tables."""
    titles = {name: variant.title for name, variant in report.variants.items()}
    notes = [
        f"{titles[name]}, seed {seed}: **did not finish**, so it is in no number here." for name, seed in report.missing
    ]
    if report.not_run:
        notes.append(
            f"Not run (left out by `--only` or `--seeds`, or not reached yet), so in no number here: {told_left_out(report)}."
        )
    if report.outdated:
        notes.append(
            f"Measured before the study's prompts or measures changed, so **not comparable with the others** until the study is run"
            f" again: {told_runs(report, report.outdated)}."
        )
    notes += [f"Not finite, so counted as not measured: {text}." for text in report.not_finite]
    if len(report.seeds) == 1:
        notes.append("One seed: nothing is tested. Differences may be seed noise, however large they look.")
    elif len(report.seeds) < SEEDS_TO_DECIDE:
        notes.append(
            f"With {len(report.seeds)} seeds verdicts rest on noise being roughly normal and alike in all variants. The test that assumes"
            f" less has something to say from {SEEDS_TO_DECIDE} seeds on."
        )
    notes += [*told_margins(report), *told_noise(report)]
    notes += [*flags(report), *weak(report)]
    if fixed := told_fixed(report):
        notes.append(fixed)
    if report.measured("clip_score/prompts", "clip_score/contexts") and any(
        map(scored_by_a_tiny_clip, settings_of(report))
    ):
        notes.append(
            "The CLIP score is a tiny model's CLIP's, which has seen its own drawn world and nothing else: of what these pictures show"
            " besides, **it says nothing**."
        )
    if "peak_process_mib" in report.measured() and "peak_device_mib" not in report.measured():
        notes.append(
            "Measured on a CPU: process memory is mostly libraries, and says little about what a GPU would need."
        )
    if report.with_role("speed"):
        notes.append(
            "Speed was timed one run at a time. Whether other programs had the machine too is not recorded."
            if report.timed_alone(*report.trained)
            else "Runs shared a machine, or nobody knows whether they did, so **speed is not judged**: to compare speeds, run with"
            " `--jobs 1` and nothing else beside it."
        )
    if mixed := [name for name in report.measured() if not report.one_quantity(name, *report.trained)]:
        titles_of = ", ".join(report.metrics[name].title for name in mixed)
        notes.append(
            f"Not all variants mean the same by {titles_of}: other predictions, other noise or other latents are other quantities, which are"
            " shown and **not compared**."
        )
    on_cpu = [name for name in report.trained if not report.values(name, "peak_device_mib")]
    slow = [titles[name] for name in on_cpu if optimizer_of(report, name) == "adamw8bit"]
    if slow:
        notes.append(
            f"{', '.join(slow)}: on a CPU, 8-bit AdamW costs some 35 times fused AdamW per step, so no conclusion about its speed"
            " can be drawn here."
        )
    return notes


def told_margins(report: StudyReport) -> list[str]:
    """The margins of the study file that are of no metric, and so decide nothing."""
    measured = {metric for run in report.runs.values() for metric in run.metrics}
    unknown = [name for name in report.margins if measured and name not in measured]
    return [
        f"`margins` names {name}, which no run measured, so it decides nothing.{did_you_mean(name, measured)}"
        for name in unknown
    ]


def told_runs(report: StudyReport, places: Sequence[tuple[str, int]]) -> str:
    """Runs by variant: its title alone where all its seeds are meant."""
    seeds: dict[str, list[int]] = {}
    for name, seed in places:
        seeds.setdefault(name, []).append(seed)
    return "; ".join(
        report.variants[name].title
        + ("" if set(own) >= set(report.seeds) else f", seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}")
        for name, own in seeds.items()
    )


def told_left_out(report: StudyReport) -> str:
    """What never began, in one line: whole variants, whole seeds, then single runs."""
    variants = [name for name in report.variants if name not in report.present]
    titles = [report.variants[name].title for name in variants]
    more = [f"{len(titles) - NAMED} other variants"] * (len(titles) > NAMED + 1)
    seeds = [seed for seed in dict.fromkeys(seed for _, seed in report.not_run) if seed not in report.seeds]
    whole = [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} of all variants"] * bool(seeds)
    single = [(name, seed) for name, seed in report.not_run if name not in variants and seed not in seeds]
    return "; ".join(
        [*titles[: NAMED if more else None], *more, *whole, *([told_runs(report, single)] if single else [])]
    )


def told_fixed(report: StudyReport) -> str:
    """What no run of the study varied, as far as it is known; a warning where the held-out pictures are few."""
    trained = settings_of(report)
    told = [f"the {counted(map(training_pictures, trained))}training pictures"] if trained else []
    if priors := [prior for settings in trained if (prior := settings.get("prior"))]:
        told.append(f"the {counted(map(class_pictures, priors))}pictures of the class")
    if report.with_role("learned", "kept", "followed"):
        kinds = report.with_role("learned", "kept") and not any(map(prompts_by_kind, trained))
        each = " of each kind" * bool(kinds)
        told.append(f"the {counted(map(prompts_asked, trained))}test prompts{each}, and the one starting noise of each")
    held_out = [int(n) for name in report.variants for n in report.values(name, "held_out_pictures").values()]
    if held_out:
        names = f" ({', '.join(report.held_out)})" if 0 < len(report.held_out) <= NAMED else ""
        told.append(f"the {counted(held_out)}held-out picture{'s' * (max(held_out) != 1)}{names}")
    if not told:
        return ""
    few = (
        f" **{min(held_out)} held-out is few**: below {FEW_HELD_OUT}, single pictures often say the opposite of many, however sure the"
        " seeds are."
        if held_out and min(held_out) < FEW_HELD_OUT
        else ""
    )
    return (
        f"The same for every seed, so no interval over seeds speaks of it: {'; '.join(told)}. Of other prompts those intervals speak that"
        f" are said to be over prompts too; of other pictures none does.{few}"
    )


def settings_of(report: StudyReport) -> list[Mapping[str, Any]]:
    """What the study said of each run that was trained."""
    return [run.settings for name in report.trained for run in report.runs_of(name)]


def scored_by_a_tiny_clip(settings: Mapping[str, Any]) -> bool:
    """Whether the CLIP of a tiny model judged a run's pictures, since it names no other."""
    base = (settings.get("model") or {}).get("base", ModelConfig.model_fields["base"].default)
    return bool(settings) and base in os.listdir(SHIPPED) and not (settings.get("evaluation") or {}).get("clip_model")


def counted(numbers: Iterable[int | None]) -> str:
    """ "48 ", or "48 to 1,000 " where runs differ; "" where a number is not known."""
    known = set(numbers)
    if not known or None in known:
        return ""
    return f"{min(known):,} " if len(known) == 1 else f"{min(known):,} to {max(known):,} "


def training_pictures(settings: Mapping[str, Any]) -> int | None:
    """How many pictures a run was trained on: of the drawn world it says so itself, of a folder only its log does."""
    return said_of_shapes(settings, "num_pictures")


def class_pictures(prior: Mapping[str, Any]) -> int | None:
    """How many pictures of the class the base drew for a run; of a folder only its log says it."""
    return None if prior.get("path") else prior.get("num_pictures", PriorConfig.model_fields["num_pictures"].default)


def prompts_asked(settings: Mapping[str, Any]) -> int | None:
    own = prompts_by_kind(settings) or (settings.get("evaluation") or {}).get("prompts") or ()
    return said_of_shapes(settings, "checked_prompts") or len(own) or None


def prompts_by_kind(settings: Mapping[str, Any]) -> list[str]:
    """The prompts of all groups of a run on pictures of one's own; empty where it has no groups."""
    groups = (settings.get("evaluation") or {}).get("prompt_groups") or {}
    return [prompt for prompts in groups.values() for prompt in prompts]


def said_of_shapes(settings: Mapping[str, Any], field: str) -> int | None:
    """A field of a run's `shapes`, its default included; None for other pictures than the drawn world's."""
    if (settings.get("data") or {}).get("source") != "shapes":
        return None
    return (settings.get("shapes") or {}).get(field, ShapesConfig.model_fields[field].default)


def optimizer_of(report: StudyReport, name: str) -> str | None:
    """What the study says of a variant's optimizer, as its runs recorded it."""
    sections = [run.settings.get("optimizer") for run in report.runs_of(name)] + [
        report.variants[name].run.get("optimizer")
    ]
    return next((section["name"] for section in sections if section and "name" in section), None)
