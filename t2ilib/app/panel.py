"""The settings that all tabs share: what the left side of the page holds, and what changes in it.

Fields are built here and nowhere else, one for each name in `asking.NAMES`. A picture that is dropped fills them all. An adapter that is chosen
alone brings the base that it was trained over.
"""

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from t2ilib.app.answering import QUIET, Updates
from t2ilib.app.asking import (
    ADAPTERS,
    NAMES,
    SLOTS,
    STRENGTHS,
    WEIGHTS,
    adapters_of,
    form_of,
    model_of,
    settings_of,
    take_settings,
)
from t2ilib.app.choices import adapter_choices, base_choices
from t2ilib.app.studio import Studio
from t2ilib.app.visitors import Visitor
from t2ilib.app.wording import told, told_error
from t2ilib.config import ConfigError
from t2ilib.drawing.finding import base_of
from t2ilib.drawing.pngtext import Restored, read_picture
from t2ilib.drawing.samplers import AUTO, SAMPLERS
from t2ilib.drawing.settings import USUAL_GUIDANCE, USUAL_STEPS, AdapterChoice, DrawSettings

WEAKEST, STRONGEST = -1.0, 2.0
"""Ends of a strength's slider; a picture that was drawn with another makes it longer."""


class Panel:
    """The fields, built into what is open of the page. `fields`: name -> component, in the order of `asking.NAMES`; `told`: where it tells what
    came of a picture, or of another adapter."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.fields: dict[str, Any] = {}
        self.rows: list[gr.Row] = []
        self.runs, self.names, said = self.lists()
        self.begins = studio.first_adapters(self.runs)[:SLOTS]
        self.first = form_of(DrawSettings(model=studio.model)) | dict(zip(ADAPTERS, self.begins, strict=False))
        self.build_prompts()
        self.build_adapters()
        self.build_details()
        self.build_base()
        self.drop = gr.File(
            label="Drop a picture here to take over its settings",
            height=90,
            elem_id="drop",
            type="filepath",
        )
        self.told = gr.HTML(said, elem_id="panel-told")
        self.inputs = [self.fields[name] for name in NAMES]

    def field(self, name: str, kind: Callable[..., Any], label: str, **options: Any) -> Any:
        """One field, with the value that a page begins with."""
        self.fields[name] = kind(value=self.first[name], label=label, elem_id=f"field-{name}", **options)
        return self.fields[name]

    def build_prompts(self) -> None:
        self.field("prompt", gr.Textbox, "Prompt", lines=2, placeholder="a red circle above a blue square")
        self.field("negative_prompt", gr.Textbox, "Negative prompt", lines=1, placeholder="what to lead away from")
        with gr.Row():
            self.field("num_pictures", gr.Number, "Pictures", precision=0, min_width=80)
            self.field("seed", gr.Textbox, "Seed", min_width=100)
            self.field("random", gr.Checkbox, "Random seed", min_width=110)

    def build_adapters(self) -> None:
        for slot, (name, strength) in enumerate(zip(ADAPTERS, STRENGTHS, strict=True)):
            with gr.Row(visible=slot < max(1, len(self.begins)), equal_height=True) as row:
                label = "Adapter" if slot == 0 else f"Adapter {slot + 1}"
                self.field(
                    name,
                    gr.Dropdown,
                    label,
                    choices=adapter_choices(self.runs, self.names),
                    allow_custom_value=True,
                    scale=3,
                    min_width=340,
                    info="A run, or the path of a file or of a run" if slot == 0 else None,
                )
                self.field(
                    strength,
                    gr.Slider,
                    f"Strength{'' if slot == 0 else f' {slot + 1}'}",
                    minimum=WEAKEST,
                    maximum=STRONGEST,
                    step=0.05,
                    scale=2,
                    min_width=200,
                    info="0 is off, 1 as trained" if slot == 0 else None,
                )
            self.rows.append(row)
        with gr.Row():
            self.more = gr.Button("Add an adapter", size="sm")
            self.look = gr.Button("Look for new adapters", size="sm")

    def build_details(self) -> None:
        with gr.Row():
            self.field(
                "num_inference_steps", gr.Number, "Steps", precision=0, min_width=80, placeholder=str(USUAL_STEPS)
            )
            self.field(
                "guidance_scale", gr.Number, "Guidance", step=0.5, min_width=80, placeholder=f"{USUAL_GUIDANCE:g}"
            )
            self.field(
                "sampler",
                gr.Dropdown,
                "Sampler",
                choices=[AUTO, *SAMPLERS],
                allow_custom_value=True,
                min_width=140,
            )
        with gr.Row():
            self.field("width", gr.Textbox, "Width", placeholder="the base's own", min_width=110)
            self.field("height", gr.Textbox, "Height", placeholder="the base's own", min_width=110)

    def build_base(self) -> None:
        with gr.Accordion("Base model, and what is rarely needed", open=False, elem_id="rare"):
            self.field(
                "base",
                gr.Dropdown,
                "Base model",
                choices=base_choices(self.runs, self.studio.model.base),
                allow_custom_value=True,
                info="tiny-sdxl, a diffusers folder, a .safetensors file, a Hub id",
            )
            self.base_told = gr.HTML("", elem_id="base-told")
            with gr.Row():
                self.field("weights", gr.Dropdown, "Weights of the base", choices=list(WEIGHTS), min_width=130)
                self.field("clip_skip", gr.Number, "Text layers left out (clip skip)", precision=0, min_width=130)
            with gr.Row():
                self.field("first", gr.Number, "First picture's number", precision=0, min_width=130)
                self.field("vae_tiling", gr.Checkbox, "Decode in tiles (large pictures)", min_width=130)
            self.field(
                "partial",
                gr.Checkbox,
                "Leave out layers of adapters that the base does not have",
                info="to draw with a student of the base that they were trained on",
            )
            self.field("embeddings", gr.Textbox, "Files of words (embeddings), one a line", lines=1)

    def form(self, values: tuple) -> dict[str, Any]:
        """What the page holds, of the values that Gradio hands over for `inputs`."""
        return dict(zip(NAMES, values, strict=True))

    def settings(self, visitor: Visitor, values: tuple) -> DrawSettings:
        """What the page asks for. Raises ConfigError as `asking.settings_of`."""
        return settings_of(self.form(values), visitor)

    def seed_told(self, settings: DrawSettings) -> Updates:
        """Shows which seed was taken."""
        return {self.fields["seed"]: str(settings.seed)}

    def filled(self, form: Mapping[str, Any]) -> Updates:
        """The fields with these values, and as many rows of adapters as are needed."""
        updates = {self.fields[name]: gr.update(value=form[name]) for name in NAMES}
        for name in STRENGTHS:
            low, high = min(WEAKEST, form[name]), max(STRONGEST, form[name])
            updates[self.fields[name]] = gr.update(value=form[name], minimum=low, maximum=high)
        used = [slot for slot, name in enumerate(ADAPTERS) if form[name]]
        shown = max(used, default=0)
        return updates | {row: gr.update(visible=slot <= shown) for slot, row in enumerate(self.rows)}

    def wire(self, take_grid: Callable[[Restored], Updates], grid_outputs: list[Any]) -> None:
        """What happens when something changes. `take_grid`: shows the axes of a sheet that was dropped, in `grid_outputs`."""
        shown = gr.State(1)
        self.more.click(self.one_more, shown, [shown, *self.rows], **QUIET)
        about = [self.told, *(self.fields[name] for name in ("base", "weights", "clip_skip", "sampler"))]
        for name in ADAPTERS:
            # what was chosen from the list, typed, or put there by a picture: the base follows only what a person did
            self.fields[name].input(self.adapter_chosen, self.inputs, about, **QUIET)
        for name in ("base", "weights"):
            self.fields[name].change(self.base_chosen, self.inputs, [self.base_told, self.fields["sampler"]], **QUIET)

        def dropped(file: str | None, request: gr.Request) -> Updates:
            return self.picture_dropped(file, self.studio.visitors.of(request.session_hash), take_grid)

        self.drop.upload(dropped, self.drop, [self.drop, self.told, *self.inputs, *self.rows, *grid_outputs], **QUIET)

    def one_more(self, shown: int) -> list[Any]:
        shown = min(SLOTS, shown + 1)
        return [shown, *(gr.update(visible=True) if slot < shown else gr.skip() for slot in range(SLOTS))]

    def picture_dropped(self, file: str | None, visitor: Visitor, take_grid: Callable[[Restored], Updates]) -> Updates:
        """Takes over the settings of a picture; what it lacks or has too much is told."""
        if file is None:
            return {self.told: ""}
        try:
            restored = read_picture(file)
            form, notes = take_settings(restored, visitor)
            grid = take_grid(restored)
        except (ConfigError, OSError) as error:
            return {self.drop: None, self.told: told_error(error)}
        name = "a sheet's settings, with the axes of its grid" if restored.grid else "the picture's settings"
        said = told("\n".join([f"Taken over: {name}.", *notes]), "note" if notes else "good")
        return {self.drop: None, self.told: said, **self.filled(form), **grid}

    def adapter_chosen(self, request: gr.Request, *values: Any) -> Updates:
        """Takes the base that the only adapter was trained over; of further ones tells where theirs is another."""
        visitor, form = self.studio.visitors.of(request.session_hash), self.form(values)
        try:
            chosen = adapters_of(form)
            if not chosen:
                return {self.told: ""}
            bases = [base_of(AdapterChoice.model_validate(one), self.studio.results) for one in chosen]
            if len(chosen) == 1 and bases[0] is not None and bases[0] != visitor.model:
                return self.another_base(visitor, form, bases[0])
        except (ConfigError, OSError) as error:
            return {self.told: told_error(error)}
        others = [
            f"{one['path']} was trained over {base.base}, and the base here is {form['base']}"
            for one, base in zip(chosen, bases, strict=True)
            if base is not None and base.base != form["base"]
        ]
        return {self.told: told("\n".join(others), "note") if others else ""}

    def another_base(self, visitor: Visitor, form: dict[str, Any], model: Any) -> Updates:
        changed = model.base != form["base"]
        visitor.model = model
        taken = form_of(DrawSettings(model=model))
        said = told(f"The base is {model.base} now, over which this adapter was trained.") if changed else ""
        fields = {self.fields[name]: taken[name] for name in ("base", "weights", "clip_skip")}
        return {self.told: said, **fields, **self.samplers(visitor, form | taken)}

    def base_chosen(self, request: gr.Request, *values: Any) -> Updates:
        """Offers the samplers that fit."""
        try:
            return {
                self.base_told: "",
                **self.samplers(self.studio.visitors.of(request.session_hash), self.form(values)),
            }
        except (ConfigError, OSError) as error:
            return {self.base_told: told_error(error)}

    def samplers(self, visitor: Visitor, form: Mapping[str, Any]) -> Updates:
        fit = self.studio.desk.samplers(model_of(form, visitor))
        return {self.fields["sampler"]: gr.update(choices=[AUTO, *fit])}

    def lists(self, anywhere: bool = False) -> tuple[list, list, str]:
        """Runs, names of the registry, and what is to be told of it. `anywhere`: see `Studio.registered`."""
        runs, said = self.studio.runs(), ""
        try:
            names = self.studio.registered(anywhere)
        except ConfigError as error:
            names, said = [], told(str(error), "note")
        return runs, names, said

    def offered(self, runs: list, names: list) -> Updates:
        """The lists of adapters and bases as they are now."""
        choices = adapter_choices(runs, names)
        updates = {self.fields[name]: gr.update(choices=choices) for name in ADAPTERS}
        bases = base_choices(runs, self.studio.model.base)
        return updates | {self.fields["base"]: gr.update(choices=bases)}

    def begun(self, runs: list, names: list) -> Updates:
        """The lists for a new page, and the adapters that it begins with, where that are others now than when the server was started."""
        updates, begins = self.offered(runs, names), self.studio.first_adapters(runs)[:SLOTS]
        if begins != self.begins:
            choices = adapter_choices(runs, names)
            for name, text in zip(ADAPTERS, begins, strict=False):
                updates[self.fields[name]] = gr.update(choices=choices, value=text)
        return updates
