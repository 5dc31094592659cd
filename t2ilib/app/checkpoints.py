"""The second tab: a run's checkpoints on a slider, the same prompts and noise at each, and the one that is kept as an adapter file."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from t2ilib.app.answering import QUIET, Updates, answer, stop_button
from t2ilib.app.asking import prompts_of
from t2ilib.app.choices import runs_with_steps
from t2ilib.app.draw import gallery_update, picture_gallery
from t2ilib.app.panel import Panel
from t2ilib.app.steps import (
    FORMATS,
    StepPictures,
    export_moment,
    export_name,
    find_run,
    formats_for,
    jobs_of,
    moments_of,
    require_kept,
)
from t2ilib.app.studio import Studio
from t2ilib.app.visitors import Visitor
from t2ilib.app.wording import count_told, told, told_progress
from t2ilib.config import ConfigError
from t2ilib.drawing.desk import Drawing
from t2ilib.drawing.finding import Found


class CheckpointsTab:
    """The tab, built into what is open of the page."""

    def __init__(self, studio: Studio, panel: Panel):
        self.studio, self.panel = studio, panel
        runs = runs_with_steps(panel.runs)
        self.first = runs[0][1] if runs else None
        self.run = gr.Dropdown(
            runs,
            value=self.first,
            label="Run",
            elem_id="steps-run",
            info="Those that kept checkpoints, newest first",
        )
        self.prompts = gr.Textbox(
            "",
            label="Prompts, one a line",
            lines=2,
            placeholder="without any: the prompt on the left",
            elem_id="steps-prompts",
        )
        with gr.Row():
            self.button = gr.Button("Draw at every checkpoint", variant="primary", elem_id="steps-draw")
            self.told = gr.HTML("", elem_id="steps-told", render=False)
            stop_button(studio, self.told)
        self.told.render()
        self.slider = gr.Slider(0, 1, 0, step=1, label="Checkpoint", elem_id="steps-slider", visible=False, buttons=[])
        self.title = gr.Markdown("", elem_id="steps-title")
        self.gallery = picture_gallery("The same prompts and noise at this checkpoint")
        with gr.Accordion("Keep this one: write its adapter to a file", open=False, elem_id="steps-keep"):
            with gr.Row():
                self.form = gr.Dropdown(list(FORMATS["lora"]), label="For", elem_id="steps-format")
                self.keep = gr.Button("Write the file", elem_id="steps-export")
            self.kept = gr.HTML("", elem_id="steps-kept")
            self.files = gr.File(label="Written", interactive=False, visible=False, elem_id="steps-files")
        self.wire()

    def wire(self) -> None:
        shown = [self.title, self.gallery]
        self.button.click(
            answer(self.studio, self.told, self.draw),
            [self.run, self.prompts, *self.panel.inputs],
            [self.told, self.slider, *shown, self.form, self.kept, self.files, self.panel.fields["seed"]],
            **QUIET,
        )
        self.slider.change(self.slid, self.slider, shown, trigger_mode="always_last", queue=False, **QUIET)
        self.keep.click(
            answer(self.studio, self.kept, self.export), [self.slider, self.form], [self.kept, self.files], **QUIET
        )

    def offered(self, runs: Sequence[Found]) -> Updates:
        """The runs there are now."""
        choices = runs_with_steps(runs)
        first = {"value": choices[0][1]} if choices and not self.first else {}
        return {self.run: gr.update(choices=choices, **first)}

    def draw(self, visitor: Visitor, path: str | None, prompts: str, *values: Any) -> Iterator[Updates]:
        """Draws at every moment of a run; the slider follows what is drawn."""
        settings = self.panel.settings(visitor, values)
        run = find_run(self.studio.runs(), path)
        moments = moments_of(run)
        jobs = jobs_of(run, moments, settings, prompts)
        drawn = StepPictures(run, moments, len(prompts_of(prompts, settings)) * settings.num_pictures)
        visitor.steps = drawn
        forms = formats_for(run)
        yield {
            self.told: told("Beginning.", "going"),
            self.slider: gr.update(value=0, maximum=len(moments) - 1, visible=True),
            self.title: "",
            self.gallery: [],
            self.form: gr.update(choices=forms, value=forms[0]),
            self.kept: "",
            self.files: gr.update(value=None, visible=False),
            **self.panel.seed_told(settings),
        }
        number = 0
        for event in self.studio.follow(visitor, jobs, previews=False):
            if isinstance(event, Drawing):
                yield {self.told: self.outcome(drawn, event)}
                continue
            update = {self.told: told_progress(event)}
            for picture in event.finished:
                path = self.studio.keep(picture)
                caption = f"{picture.settings.prompt or 'no prompt'}, {path.name}"
                moment = drawn.add(number, (self.studio.serve(path), caption))
                number += 1
                update |= {self.slider: moment, **self.shown(drawn, moment)}
            yield update

    def outcome(self, drawn: StepPictures, drawing: Drawing) -> str:
        count = count_told(len(drawing.pictures), "picture")
        if drawing.stopped:
            return told(f"Stopped: {count} were whole; written to {self.studio.out}.", "note")
        return told(
            f"{count} at {len(drawn.moments)} places of {drawn.run.name}, written to {self.studio.out}."
            " Which step is to be kept? Move the slider."
        )

    def shown(self, drawn: StepPictures, moment: int) -> Updates:
        """A moment's title and pictures."""
        entries = drawn.pictures.get(moment, [])
        return {
            self.title: f"### {drawn.title(moment)}" + ("" if entries else ": not drawn"),
            self.gallery: gallery_update(entries),
        }

    def slid(self, number: float, request: gr.Request) -> Updates:
        drawn = self.studio.visitors.of(request.session_hash).steps
        if drawn is None or number >= len(drawn.moments):
            return {self.title: gr.skip()}
        return self.shown(drawn, int(number))

    def export(self, visitor: Visitor, number: float, form: str | None) -> Iterator[Updates]:
        """Writes the adapter that is shown, and hands it out."""
        drawn, number = visitor.steps, int(number)
        require_kept(drawn, number)
        if not form:
            raise ConfigError("choose what the file is for")
        yield {self.kept: told("Writing: the base is loaded for it."), self.files: gr.update(value=None, visible=False)}
        folder = self.studio.free_folder(f"exports/{export_name(drawn, number)}")
        try:
            files = export_moment(self.studio.desk, drawn, number, form, folder)
        except BaseException:
            if not any(folder.iterdir()):
                folder.rmdir()
            raise
        said = (
            f"{drawn.moments[number].label} of {drawn.run.name} lies in {folder}: {', '.join(f.name for f in files)}."
        )
        served = [self.studio.serve(file) for file in files]
        yield {self.kept: told(said), self.files: gr.update(value=served, visible=True)}
