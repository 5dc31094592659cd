"""An inspection as a folder: a page to look at, `index.html`, which needs no other file, and every file that was found in `manifest.csv`,
with totals, digests and what the captions are like in `manifest.json`.

Pictures are shown as a run sees them, the first view of each. Of many, some are shown, evenly from the first to the last. What is in the
folder already is left alone unless it is an inspection.
"""

import base64
import io
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from t2ilib.config import ConfigError, RunConfig
from t2ilib.data.advice import Suggestion, of
from t2ilib.data.dataset import save_manifest
from t2ilib.data.inspection import HELD_OUT, Alike, Inspection
from t2ilib.data.manifest import within
from t2ilib.data.pictures import PictureError, load_view, open_picture
from t2ilib.data.records import Readable, Told
from t2ilib.data.views import view_of
from t2ilib.report.inspection_figures import plot_lengths, plot_sizes, plot_words
from t2ilib.seeds import numpy_generator_for
from t2ilib.text import shown

PAGE = "index.html"
MARK = '<meta name="generator" content="t2ilib data inspect">'
"""In pages that may be written over."""
MOST_PICTURES, MOST_GROUPS, MOST_OF_A_GROUP, MOST_ROWS = 60, 30, 6, 500
SIDE = 150
"""Pixels of the longer side of a picture on the page."""
DPI = 110
STYLE = """
body { font: 14px/1.45 system-ui, "Helvetica Neue", Arial, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.8em } h2 { font-size: 1.3em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .3em .7em; text-align: left; vertical-align: top }
tr:nth-child(even) td { background: #f5f5f5 } th { border-bottom: 1px solid #888 }
code { background: #f2f2f2; padding: .1em .3em; white-space: nowrap } pre { background: #f7f7f7; padding: .8em; overflow-x: auto }
.stop { border-left: 5px solid #ee6677; background: #fdf0f1; padding: .5em 1em; white-space: pre-line }
.go { border-left: 5px solid #228833; background: #eef7f0; padding: .5em 1em }
.grid, .alike { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start } .alike { margin: 0 0 14px }
figure { margin: 0; width: 150px; overflow-wrap: anywhere } figcaption { font-size: 12px; line-height: 1.3 }
figure img { display: block; max-width: 150px } small { color: #777 } .part { color: #aa3377 } .plots img { max-width: 100% }
"""


def require_free(folder: Path, run: RunConfig) -> None:
    """Raises ConfigError where writing to `folder` would change what is the user's."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file: name a folder for the page and the manifest")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise ConfigError(f"--out {folder} holds other files than an inspection's: name another folder")
    for place in (run.data.path, run.data.validation_path):
        if place and Path(place).is_dir() and folder.resolve().is_relative_to(Path(place).resolve()):
            raise ConfigError(f"--out {folder} lies among the pictures of {place}: name a folder elsewhere by --out")


def is_ours(folder: Path) -> bool:
    page = folder / PAGE
    return page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:500]


def write_page(found: Inspection, suggestions: Sequence[Suggestion], folder: Path) -> Path:
    """Writes `folder`; returns the path of the page. Raises ConfigError as `require_free`."""
    require_free(folder, found.run)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    page.write_text(page_text(found, suggestions), encoding="utf-8")  # first: it marks the folder as an inspection's
    save_manifest(found.training, found.held_out, folder / "manifest.csv")
    return page


def page_text(found: Inspection, suggestions: Sequence[Suggestion]) -> str:
    title = escape(f"{shown(found.root)}: {of(len(found.records), 'picture')}")
    sections = [
        f"<h1>{title}</h1>",
        totals(found),
        verdict(found),
        section("What could be set", suggested(suggestions)),
        section("As trained", grid(found)),
        section("Sizes", plotted(plot_sizes(found), "Width and height of every picture")),
        section("Captions", plotted(plot_lengths(found), "Words of a caption") + repeated(found)),
        section("Words", plotted(plot_words(found), "The most frequent words")),
        section("The same, or nearly", doubles(found)),
        section("Rejected", table(found, found.rejected)),
        section("Left aside", table(found, found.aside)),
        section("Noted", table(found, notes(found))),
    ]
    head = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{MARK}'
    head += f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style></head>'
    return f"{head}\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"


def section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def totals(found: Inspection) -> str:
    data = found.run.data
    counted = [
        (found.num_training, "to train on"),
        (found.num_held_out, "held out"),
        (len(found.rejected), "rejected"),
        (len(found.aside), "left aside"),
        (len(found.hidden), "hidden"),
    ]
    side = (
        f"samples of about {data.resolution} x {data.resolution} pixels"
        if data.buckets
        else f"samples of {data.resolution} x {data.resolution} pixels"
    )
    said = ", ".join(f"<b>{count:,}</b> {what}" for count, what in counted if count)
    return f"<p>Source {escape(data.source)}: {said or 'nothing'}; {side}{', which was assumed' * found.assumed}. Every file with its reason is in <a href='manifest.csv'>manifest.csv</a>, totals and digests in <a href='manifest.json'>manifest.json</a>.</p>"


def verdict(found: Inspection) -> str:
    if not found.stops:
        return '<p class="go">A run with these pictures would begin.</p>'
    return "".join(f'<p class="stop">A run would stop: {escape(shown(why))}</p>' for why in found.stops)


def suggested(suggestions: Sequence[Suggestion]) -> str:
    rows = [
        "<tr><td>{}</td><td>{}</td></tr>".format(
            " ".join(f"<code>--set {escape(shlex.quote(one))}</code>" for one in suggestion.sets),
            escape(suggestion.why),
        )
        for suggestion in suggestions
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def grid(found: Inspection) -> str:
    """Pictures as samples, with their captions as they are trained on."""
    count = min(MOST_PICTURES, len(found.records))
    shown_ones = [number * len(found.records) // count for number in range(count)]
    figures = [as_trained(found, number) for number in shown_ones]
    some = f"<p>{count} of {len(found.records):,}.</p>" if count < len(found.records) else ""
    return f'{some}<div class="grid">{"".join(figures)}</div>' if figures else ""


def as_trained(found: Inspection, number: int) -> str:
    record, seen, data = found.records[number], found.seen[number], found.run.data
    target = tuple(found.assigned.targets[number].tolist())
    drawn = numpy_generator_for(0, "view of a picture", seen.sha256.hex(), 0)
    still = found.parts[number] == HELD_OUT
    view = view_of(
        (seen.height, seen.width), target, "center" if still else data.crop, 0.0 if still else data.flip, drawn
    )
    try:
        image = Image.fromarray(load_view(record.path, view, data.ground).pixels)
    except PictureError as error:
        return figure(None, record.path, escape(str(error)), found)
    part = '<span class="part">held out</span> ' if still else ""
    captions = " / ".join(escape(shown(text)) for text in record.captions[:2])
    more = f" <small>and {len(record.captions) - 2} more</small>" if len(record.captions) > 2 else ""
    sizes = f"<small>{seen.width}x{seen.height} to {target[1]}x{target[0]}</small>"
    return figure(image, record.path, f"{part}{captions}{more}<br>{sizes}", found)


def figure(image: Image.Image | None, path: Readable, words: str, found: Inspection) -> str:
    """`words` are HTML."""
    drawn = "" if image is None else f'<img src="{as_jpeg(image)}" alt="">'
    return (
        f"<figure>{drawn}<figcaption><small>{escape(within(found.root, path))}</small><br>{words}</figcaption></figure>"
    )


def as_jpeg(image: Image.Image) -> str:
    """Small ones are enlarged by whole numbers, so that their pixels are seen."""
    factor = SIDE // max(image.size)
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def plotted(figure: Figure | None, about: str) -> str:
    if figure is None:
        return ""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<div class="plots"><img src="data:image/png;base64,{data}" alt="{about}"></div>'


def repeated(found: Inspection) -> str:
    rows = [
        f"<tr><td>{count:,}</td><td>{escape(shown(caption))}</td></tr>" for caption, count in found.captions.repeated
    ]
    return f"<p>Captions of several pictures:</p><table>{''.join(rows)}</table>" if rows else ""


def doubles(found: Inspection) -> str:
    leaks_first = sorted(found.alike, key=lambda alike: not alike.leaks)
    told = [side_by_side(found, alike) for alike in leaks_first[:MOST_GROUPS]]
    return (
        f"<p>{of(len(found.alike), 'group')}{f', of which {MOST_GROUPS} are shown' * (len(found.alike) > MOST_GROUPS)}.</p>{''.join(told)}"
        if told
        else ""
    )


def side_by_side(found: Inspection, alike: Alike) -> str:
    figures = []
    for number in alike.numbers[:MOST_OF_A_GROUP]:
        record, seen = found.records[number], found.seen[number]
        words = f"{'<span class=part>held out</span>' if found.parts[number] == HELD_OUT else 'trained on'} <small>{seen.width}x{seen.height}</small>"
        try:
            image = open_picture(record.path, found.run.data.ground, (SIDE, SIDE))
        except PictureError as error:
            image, words = None, escape(str(error))
        figures.append(figure(image, record.path, words, found))
    more = f"<p>and {len(alike.numbers) - MOST_OF_A_GROUP} more</p>" * (len(alike.numbers) > MOST_OF_A_GROUP)
    too_good = f", on both sides: the held-out loss {'is' if alike.exact else 'may be'} too good"
    said = f"{'equal files' if alike.exact else 'near'}{too_good * alike.leaks}"
    return f'<p>{said}</p><div class="alike">{"".join(figures)}</div>{more}'


def notes(found: Inspection) -> list[Told]:
    return [(record.path, note) for record, seen in zip(found.records, found.seen, strict=True) for note in seen.notes]


def table(found: Inspection, told: Iterable[Told]) -> str:
    told = list(told)
    rows = [
        f"<tr><td>{escape(within(found.root, path))}</td><td>{escape(shown(why))}</td></tr>"
        for path, why in told[:MOST_ROWS]
    ]
    more = f"<p>and {len(told) - MOST_ROWS:,} more, in manifest.csv</p>" * (len(told) > MOST_ROWS)
    return f"<table>{''.join(rows)}</table>{more}" if rows else ""
