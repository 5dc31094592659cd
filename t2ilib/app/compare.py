"""The fourth tab: which of two variants do people prefer? Same prompt, same noise, names hidden until the votes are in."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from t2ilib.app import blind
from t2ilib.app.answering import QUIET, Updates, answer, stop_button
from t2ilib.app.blind import Comparison
from t2ilib.app.choices import ALL_RUNS, BASE_ALONE, Choice, studies, variant_choices
from t2ilib.app.panel import Panel
from t2ilib.app.studio import Studio
from t2ilib.app.visitors import Visitor
from t2ilib.app.wording import count_told, told, told_progress
from t2ilib.config import ConfigError
from t2ilib.drawing.desk import Drawing
from t2ilib.drawing.finding import Found
from t2ilib.drawing.voting import LEFT, RIGHT, TIE, export_votes


class CompareTab:
    """The tab, built into what is open of the page."""

    def __init__(self, studio: Studio, panel: Panel):
        self.studio, self.panel = studio, panel
        with gr.Row(equal_height=True):
            choices = variant_choices(panel.runs, ALL_RUNS, panel.names)
            options = {"choices": choices, "allow_custom_value": True, "min_width": 180}
            self.study = gr.Dropdown(
                studies(panel.runs), value=ALL_RUNS, label="Out of", elem_id="vote-study", min_width=120
            )
            newest = choices[min(1, len(choices) - 1)][1]
            self.one = gr.Dropdown(value=newest, label="One variant", elem_id="vote-one", **options)
            self.other = gr.Dropdown(value="", label="The other", elem_id="vote-other", **options)
        self.prompts = gr.Textbox(
            "",
            label="Prompts to compare them on, one a line",
            lines=2,
            placeholder="without any: the prompt on the left",
            elem_id="vote-prompts",
        )
        with gr.Row():
            self.button = gr.Button("Draw the pairs", variant="primary", elem_id="vote-draw")
            self.told = gr.HTML("", elem_id="vote-told", render=False)
            stop_button(studio, self.told)
        self.told.render()
        self.build_ballot()
        self.build_outcome()
        self.wire()

    def build_ballot(self) -> None:
        with gr.Column(visible=False) as self.booth:
            self.prompt = gr.Markdown("", elem_id="vote-prompt")
            with gr.Row():
                options = {"format": "png", "type": "filepath", "interactive": False, "height": 400}
                options["buttons"] = ["fullscreen"]
                self.left = gr.Image(label="Left", elem_id="vote-left-picture", elem_classes=["drawn"], **options)
                self.right = gr.Image(label="Right", elem_id="vote-right-picture", elem_classes=["drawn"], **options)
            with gr.Row():
                self.sides = {
                    LEFT: gr.Button("Left is better", elem_id="vote-left"),
                    TIE: gr.Button("No difference", elem_id="vote-tie"),
                    RIGHT: gr.Button("Right is better", elem_id="vote-right"),
                }

    def build_outcome(self) -> None:
        self.tally = gr.HTML("", elem_id="vote-tally")
        with gr.Accordion("Votes: result, file, and those of others", open=False, elem_id="vote-more"):
            self.voter = gr.Textbox("", label="Your name", placeholder="may be left empty", elem_id="vote-voter")
            with gr.Row():
                self.result = gr.Button("Show the result", elem_id="vote-result")
                self.export = gr.Button("Write the votes to a file", elem_id="vote-export")
                self.again = gr.Button("Draw the pairs of these votes", visible=False, elem_id="vote-again")
            self.file = gr.File(label="Votes", interactive=False, visible=False, elem_id="vote-file")
            self.drop = gr.File(label="Drop a file of votes here to add them", height=90, elem_id="vote-drop")

    def wire(self) -> None:
        booth = [self.booth, self.prompt, self.left, self.right]
        drawing = [self.told, *booth, self.tally, self.file, self.again, self.panel.fields["seed"]]
        names = [self.study, self.one, self.other, self.prompts, self.voter]
        start = answer(self.studio, self.told, self.start)
        self.button.click(start, [*names, *self.panel.inputs], drawing, **QUIET)
        self.again.click(answer(self.studio, self.told, self.draw), self.voter, drawing, **QUIET)
        for side, button in self.sides.items():
            voted = answer(self.studio, self.told, lambda visitor, voter, side=side: self.vote(visitor, side, voter))
            button.click(voted, self.voter, [self.told, *booth, self.tally], **QUIET)
        named = answer(self.studio, self.told, self.named)
        for leaves in (self.voter.submit, self.voter.blur):
            leaves(named, self.voter, [self.told, *booth, self.tally], **QUIET)
        self.result.click(answer(self.studio, self.tally, self.show_result), None, self.tally, **QUIET)
        self.export.click(answer(self.studio, self.tally, self.write), None, [self.tally, self.file], **QUIET)
        self.drop.upload(
            answer(self.studio, self.tally, self.take), self.drop, [self.tally, self.drop, self.again], **QUIET
        )
        self.study.input(self.study_chosen, self.study, [self.one, self.other], **QUIET)

    def offered(self, runs: Sequence[Found], names: Sequence[str]) -> Updates:
        """The studies and variants there are now."""
        choices = variant_choices(runs, ALL_RUNS, names)
        return {
            self.study: gr.update(choices=studies(runs), value=ALL_RUNS),
            self.one: gr.update(choices=choices),
            self.other: gr.update(choices=choices),
        }

    def choices(self, study: str | None) -> list[Choice]:
        names = self.panel.lists()[1] if study in (None, ALL_RUNS) else ()
        return variant_choices(self.studio.runs(), study or ALL_RUNS, names)

    def study_chosen(self, study: str) -> list[Any]:
        choices = self.choices(study)
        one, other = (choices[1:3] if len(choices) > 2 else [*choices[1:], BASE_ALONE, BASE_ALONE])[:2]
        return [gr.update(choices=choices, value=one[1]), gr.update(choices=choices, value=other[1])]

    def start(
        self, visitor: Visitor, study: str, one: str, other: str, prompts: str, voter: str, *values: Any
    ) -> Iterator[Updates]:
        """Begins a comparison of what was chosen."""
        settings = self.panel.settings(visitor, values)
        visitor.comparison = blind.start(
            self.choices(study), one or "", other or "", prompts, settings, self.studio.results
        )
        yield self.panel.seed_told(settings)
        yield from self.draw(visitor, voter)

    def draw(self, visitor: Visitor, voter: str) -> Iterator[Updates]:
        """Draws the pairs of a comparison, and shows the first."""
        comparison = visitor.comparison
        if comparison is None:
            raise ConfigError("there are no votes whose pairs could be drawn: drop a file of them")
        yield {
            self.told: told("Beginning.", "going"),
            self.booth: gr.update(visible=False),
            self.tally: "",
            self.file: gr.update(value=None, visible=False),
            self.again: gr.update(visible=False),
        }
        number = 0
        for event in self.studio.follow(visitor, comparison.jobs(), previews=False):
            if isinstance(event, Drawing):
                yield self.next_pair(comparison, voter, stopped=event.stopped)
                continue
            for picture in event.finished:
                self.studio.keep(picture)
                comparison.add(number, self.studio.serve_bare(picture.image))
                number += 1
            yield {self.told: told_progress(event)}

    def next_pair(self, comparison: Comparison, voter: str, stopped: bool = False) -> Updates:
        """Shows what is voted on next, or what came of it where all is voted on."""
        pair = comparison.next_pair(voter.strip())
        if pair is None:
            done = f"All pairs are voted on, {comparison.progress()}. Who else votes writes their name below first."
            said = done if comparison.shown else "No pair was drawn."
            result = self.result_told(comparison) if comparison.votes.votes else ""
            return {self.told: told(said), self.booth: gr.update(visible=False), self.tally: result}
        left, right = comparison.shown[pair.number]
        head = "Stopped; those that were drawn can be voted on. " if stopped else ""
        return {
            self.told: told(f"{head}Which is better? {comparison.progress()}."),
            self.booth: gr.update(visible=True),
            self.prompt: f"Pair {pair.number + 1} of {len(comparison.votes.ballot.pairs())}: {escaped(pair.prompt)}",
            self.left: left,
            self.right: right,
        }

    def vote(self, visitor: Visitor, side: str, voter: str) -> Iterator[Updates]:
        comparison = required(visitor.comparison)
        comparison.vote(side, voter.strip())
        yield self.next_pair(comparison, voter)

    def named(self, visitor: Visitor, voter: str) -> Iterator[Updates]:
        """Shows what this voter has before them."""
        comparison = visitor.comparison
        if comparison is not None and comparison.shown:
            updates = self.next_pair(comparison, voter)
            yield updates if comparison.pair is None else updates | {self.tally: ""}

    def result_told(self, comparison: Comparison) -> str:
        return told(blind.told_result(comparison.votes.ballot, comparison.votes.tally().sentence()))

    def show_result(self, visitor: Visitor) -> Iterator[Updates]:
        yield {self.tally: self.result_told(required(visitor.comparison))}

    def write(self, visitor: Visitor) -> Iterator[Updates]:
        """The votes as a file; it names the variants."""
        votes = required(visitor.comparison).votes
        if not votes.votes:
            raise ConfigError("there is no vote yet to write")
        path = self.studio.numbered("votes", ".json")
        export_votes(votes, path)
        said = told(f"{count_told(len(votes.votes), 'vote')} written to {path}.")
        yield {self.tally: said, self.file: gr.update(value=self.studio.serve(path), visible=True)}

    def take(self, visitor: Visitor, file: str | None) -> Iterator[Updates]:
        """Adds the votes of a file, or begins with them."""
        yield {self.drop: None}
        had = visitor.comparison is not None and bool(visitor.comparison.shown)
        comparison, added = blind.take_votes(visitor.comparison, Path(file))
        visitor.comparison = comparison
        said = f"{count_told(added, 'vote')} added.\n{blind.told_result(comparison.votes.ballot, comparison.votes.tally().sentence())}"
        yield {self.tally: told(said), self.again: gr.update(visible=not had)}


def required(comparison: Comparison | None) -> Comparison:
    """Raises ConfigError where nothing is compared."""
    if comparison is None:
        raise ConfigError("nothing is compared yet: draw some pairs, or drop a file of votes")
    return comparison


def escaped(text: str) -> str:
    """A prompt as Markdown shows it, letter by letter."""
    return "".join(f"&#{ord(letter)};" if not (letter.isalnum() or letter in " ,.") else letter for letter in text)
