"""Which checkpoint to keep, as one page: `checkpoints.html`, which needs no other file and asks nothing of the network.

For each variant the step to keep, how sure that is and why, what the held-out loss would have chosen, all measures by step, the path from
the base through learned and kept, and grids of checkpoint x strength x noise with a column without the adapter. The numbers lie beside it
as JSON (`checkpoints.summary`).
"""

from collections.abc import Mapping, Sequence
from html import escape
from shlex import quote

import numpy as np
from matplotlib.figure import Figure

from t2ilib.drawing.stepgrid import StepRow, StepSheet
from t2ilib.evaluation.metrics import Metric
from t2ilib.evaluation.steps import BASE
from t2ilib.report.checkpoints import VariantSteps
from t2ilib.report.checkpoints_figures import plot_curves, plot_path
from t2ilib.report.embedding import figure_uri, picture_uri
from t2ilib.statistics.choosing import RESAMPLES, Choice

STYLE = """
body { font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: #222; max-width: 1120px; margin: 2em auto; padding: 0 1.2em }
h1 { font-size: 1.7em; margin-bottom: .2em } h2 { font-size: 1.4em; margin: 2.2em 0 .6em; border-top: 1px solid #ddd; padding-top: .9em }
h3 { font-size: 1.05em; margin: 1.8em 0 .4em }
.lead { color: #555; max-width: 52em } p { max-width: 58em }
.keep { border-left: 6px solid #ee7733; background: #fdf5ee; padding: .7em 1.2em; margin: 1em 0 }
.keep p:first-child b { font-size: 1.35em } .unsure { border-left-color: #a58f00; background: #faf7e6 }
table { border-collapse: collapse } td, th { padding: .25em .7em; text-align: left; vertical-align: top }
.numbers td, .numbers th { text-align: right } .numbers td:first-child, .numbers th:first-child { text-align: left }
.list tr:nth-child(even) td, .numbers tr:nth-child(even) td { background: #f6f6f6 } th { border-bottom: 1px solid #999; font-weight: 600 }
.chosen { color: #b9540f; font-weight: 700 } .plot { max-width: 100%; display: block }
code, pre { background: #f3f3f3; padding: .1em .35em } pre { padding: .6em .9em; overflow-x: auto }
.scroll { overflow-x: auto; padding-bottom: .6em } .grid td { padding: 2px 3px } .grid th { font-size: 12.5px; border: 0; padding: 2px 6px }
.grid tbody th { text-align: right; white-space: nowrap; font-weight: 400; color: #444; vertical-align: middle }
.grid img { display: block; width: 128px; height: auto } .grid img.small { image-rendering: pixelated }
.grid .base { padding-right: 14px } .grid .chosen img { outline: 3px solid #ee7733; outline-offset: -1px }
.grid tr.first td, .grid tr.first th { padding-top: 9px }
small, .quiet { color: #666 } details { margin: .8em 0 } summary { cursor: pointer; color: #444 }
"""


def page_text(
    title: str,
    about: str,
    variants: Sequence[VariantSteps],
    sheets: Mapping[str, Sequence[StepSheet]],
    left_out: Mapping[str, str],
) -> str:
    """The page. `about`: what the study asks; `sheets`: variant -> its grids, drawn; `left_out`: what is not here -> why."""
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(about)}</p>' if about else "", LEAD]
    if len(variants) > 1:
        parts.append(overview(variants))
    parts += [section(own, sheets.get(own.name, ())) for own in variants]
    parts += [listed_out(left_out), READING]
    head = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="t2ilib study checkpoints">'
    head += f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head>'
    return f"{head}\n<body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"


LEAD = (
    '<p class="lead">A training keeps its adapter every so many steps. Early ones have learned little, late ones may have forgotten what the'
    " base model could do, or copy the training pictures. All checkpoints here drew the same prompts from the same noise, and the same"
    " measures judged them.</p>"
)
READING = f"""<h2>How to read this</h2>
<p><b>Base</b> is the model without an adapter, step 0. <b>Learned</b> and <b>kept</b> are what the run's measures call so: what was taught,
and what the base could do before. The <b>score</b> says what is looked for; without a formula of the study's own it is the harmonic mean of
both, which is high only where both are.</p>
<p><b>The step to keep</b> is the earliest whose score is less than one standard error behind the best (Breiman et al. 1984). <b>How sure
that is</b>: the prompts are drawn anew by lot, {RESAMPLES:,} times, the same ones for every checkpoint, and of several training runs the runs too;
"best in 71% of resamples; 300 to 600 in 95%" says how often the step was best, and between which steps the best one lay. That is about
other prompts of the same kind, and looks a little surer than it is: whoever leads has had some luck with these. A checkpoint is <b>shown to
be behind</b> where the 95% model confidence set leaves it out (Hansen et al. 2011); where it leaves none out, the checkpoints cannot be told
apart.</p>
<p><b>Grids</b>: the noise is the same all along a row, so what differs is the adapter alone. Strength 1 is as trained. One picture proves
nothing; the numbers count more of them.</p>"""


def overview(variants: Sequence[VariantSteps]) -> str:
    """One row a variant."""
    head = "<tr><th>Variant</th><th>Keep</th><th>Score there</th><th>How sure</th><th>The held-out loss would keep</th></tr>"
    rows = [
        f'<tr><td><a href="#{escape(own.name)}">{escape(own.title)}</a></td><td class="chosen">step {own.choice.recommended}</td>'
        f"<td>{shown(own.deciding.metric, own.choice.score_of(own.choice.recommended))}</td><td>{escape(sureness(own.choice))}</td>"
        f"<td>{f'step {own.by_loss.recommended}' if own.by_loss else 'not measured'}</td></tr>"
        for own in variants
    ]
    return f'<table class="list">{head}{"".join(rows)}</table>'


def sureness(choice: Choice) -> str:
    """How sure a choice is, in a few words."""
    if choice.share is None:
        return "cannot be told"
    if choice.told_apart is False:
        return "checkpoints cannot be told apart"
    between = f"; {choice.earliest} to {choice.latest} in 95%" if choice.earliest != choice.latest else ""
    best = f"step {choice.best} is best" if choice.best != choice.recommended else "best"
    return f"{best} in {choice.share:.0%} of resamples{between}"


def section(own: VariantSteps, sheets: Sequence[StepSheet]) -> str:
    """All of a variant."""
    run = own.runs[own.shown_run()]
    step = own.choice.recommended
    unsure = " unsure" * (own.choice.told_apart is not True)
    several = f", {len(own.runs)} training runs (seeds {', '.join(map(str, own.seeds))})" if len(own.runs) > 1 else ""
    path = plot_path(own)
    return "\n".join(
        filter(
            None,
            (
                f'<h2 id="{escape(own.name)}">{escape(own.title)}</h2>',
                f'<p class="quiet">{len(own.choice.candidates)} checkpoints{several}'
                f"{missing(own)}. Score: {escape(own.deciding.metric.title)}{made_of(own)}.</p>",
                f'<div class="keep{unsure}"><p><b>Keep step {step}</b></p><p>{escape(capital(own.choice.sentence()))}. {escape(own.choice.reason())}</p>'
                f"<p>{escape(against_loss(own))}</p>{over_base(own)}{flagged_steps(own)}</div>",
                f"<p>Take it along (kohya is for A1111, ComfyUI and Forge):</p><pre>t2ilib export {escape(quote(str(run)))}"
                f" step-{step}.safetensors --checkpoint {step} --format kohya</pre>",
                "<h3>By training step</h3>" + plotted(plot_curves(own), f"Measures of {own.title} by training step"),
                path
                and "<h3>From the base on: learned against kept</h3>"
                + plotted(path, f"Learned against kept, {own.title}"),
                *(grid(own, sheet) for sheet in sheets),
                f"<details><summary>All numbers</summary>{numbers(own)}</details>",
            ),
        )
    )


def capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def missing(own: VariantSteps) -> str:
    return f"; not of all runs, and left out: step {', '.join(map(str, own.left_out))}" if own.left_out else ""


def made_of(own: VariantSteps) -> str:
    parts = [own.declared[name].title for name in own.deciding.parts]
    return f" ({escape(', '.join(parts))})" if parts != [own.deciding.metric.title] else ""


def against_loss(own: VariantSteps) -> str:
    """What the held-out loss would have chosen, and what that would have cost."""
    if own.by_loss is None:
        return "There is no held-out loss of these checkpoints to compare with."
    if own.deciding.metric.role == "loss":
        return "The held-out loss is all that decided: nothing else was measured that says what was learned."
    other, step = own.by_loss.recommended, own.choice.recommended
    if other == step:
        return f"The held-out loss would have chosen the same step ({own.by_loss.sentence()})."
    metric = own.deciding.metric
    there, here = (shown(metric, own.choice.score_of(one)) for one in (other, step))
    proven = " and is shown to be behind the best" if other in own.choice.behind else ""
    return f"The held-out loss would have chosen step {other}, which scores {there}{proven}; step {step} scores {here}."


def over_base(own: VariantSteps) -> str:
    """A warning where the chosen checkpoint is not shown to be better than no adapter at all."""
    if own.choice.over_base is None:
        return ""
    difference, low, high = own.choice.over_base
    if low is None or low > 0:
        return ""
    ends = " to ".join(shown(own.deciding.metric, end, signed=True) for end in (low, high))
    return (
        "<p><b>Not shown to be better than the base without an adapter</b>, over which its lead is"
        f" {shown(own.deciding.metric, difference, signed=True)} (95% interval {ends}).</p>"
    )


def flagged_steps(own: VariantSteps) -> str:
    """Where a measure says that a checkpoint is over-trained, and of the chosen one that it is."""
    if not own.flags:
        return ""
    chosen = own.choice.recommended
    first = f"<b>Step {chosen} is flagged</b>: " if chosen in own.flags else "The chosen step is not flagged. "
    steps: dict[str, list[int]] = {}
    for step, flags in own.flags.items():
        for flag in flags:
            steps.setdefault(flag, []).append(step)
    told = [f"{escape(flag)} (step {', '.join(map(str, where))})" for flag, where in steps.items()]
    return f"<p>{first}{'; '.join(told)}.</p>"


def plotted(figure: Figure, about: str) -> str:
    return f'<img class="plot" src="{figure_uri(figure)}" alt="{escape(about)}">'


def grid(own: VariantSteps, sheet: StepSheet) -> str:
    """A sheet as a table whose first column is the base."""
    chosen = own.choice.recommended
    heads = "".join(f"<th{mark(step == chosen)}>step {step}</th>" for step in sheet.steps)
    rows, strength = [], None
    for row in sheet.rows:
        rows.append(grid_row(row, sheet.steps, chosen, row.strength != strength))
        strength = row.strength
    return (
        f"<h3>“{escape(sheet.prompt)}”</h3>"
        f'<div class="scroll"><table class="grid"><thead><tr><th></th><th class="base">without<br>adapter</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def grid_row(row: StepRow, steps: Sequence[int], chosen: int, first: bool) -> str:
    base, *others = [picture(file) for file in row.files]
    cells = "".join(f"<td{mark(step == chosen)}>{one}</td>" for step, one in zip(steps, others, strict=True))
    label = f"strength {row.strength:g}<br><small>noise {row.noise}</small>"
    return f'<tr class="{"first" if first else ""}"><th>{label}</th><td class="base">{base}</td>{cells}</tr>'


def mark(chosen: bool) -> str:
    return ' class="chosen"' if chosen else ""


def picture(file) -> str:
    uri = picture_uri(file)
    return f'<img{" class=small" if uri.startswith("data:image/png") else ""} src="{uri}" alt="">'


def numbers(own: VariantSteps) -> str:
    """Every metric at every step, means over runs, and the score with its interval."""
    heads = [own.declared[name].title for name in own.metrics]
    rows = ["".join(f"<th>{escape(head)}</th>" for head in ("step", *heads, f"score: {own.deciding.metric.title}", "95% interval"))]  # fmt: skip
    for column, step in enumerate(own.steps):
        cells = ["base" if step == BASE else str(step)]
        cells += [shown(own.declared[name], float(m.values[:, column].mean())) for name, m in own.metrics.items()]
        cells += score_cells(own, step)
        chosen = mark(step == own.choice.recommended)
        rows.append("".join(f"<td{chosen}>{cell}</td>" for cell in cells))
    return '<table class="numbers">' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def score_cells(own: VariantSteps, step: int) -> list[str]:
    choice, metric = own.choice, own.deciding.metric
    if step not in choice.steps:
        return ["not measured", ""]
    place = choice.steps.index(step)
    told = "" if choice.low is None else f"{shown(metric, choice.low[place])} to {shown(metric, choice.high[place])}"
    return [shown(metric, choice.scores[place]), told]


def shown(metric: Metric, value: float, signed: bool = False) -> str:
    """A value as people read it: shares in percent, others with three digits."""
    if np.isnan(value):
        return "not measured"
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.0f} %" if metric.unit == "share" else f"{value:{sign}.3g}"


def listed_out(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(why)}</td></tr>" for name, why in left_out.items())
    return f'<h2>Not here</h2><table class="list">{rows}</table>'
