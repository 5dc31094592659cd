"""`t2ilib data preferences`: pairs of pictures of one prompt, one of them better, drawn and ranked or drawn as people voted."""

from pathlib import Path
from typing import Annotated, Any

import typer

from t2ilib.cli.drawing import chosen_adapters, chosen_base, drawing_bar
from t2ilib.cli.errors import readable_errors
from t2ilib.cli.options import (
    Adapters,
    Checkpoint,
    Config,
    Guidance,
    Height,
    Model,
    NegativePrompt,
    Partial,
    Quantization,
    Results,
    Sampler,
    Scales,
    Steps,
    Width,
)

RANKED = "How they are ranked"


def data_preferences(
    out: Annotated[Path, typer.Argument(help="The folder for the pictures and preferences.jsonl.")],
    prompts: Annotated[
        list[str],
        typer.Option(
            help="A file with a prompt a line, may be given several times; or shapes: scenes of the drawn world."
        ),
    ] = [],
    votes: Annotated[
        list[Path],
        typer.Option(
            help="Draw again what people voted on, from the file that the app or a ballot saved; may be given several times."
        ),
    ] = [],
    model: Model = None,
    config: Config = None,
    adapter: Adapters = [],
    checkpoint: Checkpoint = None,
    scale: Scales = [],
    partial: Partial = False,
    quantization: Quantization = None,
    num_pictures: Annotated[int | None, typer.Option(help="Pictures of each prompt (4).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise, and of which scenes (0).")] = None,
    negative_prompt: NegativePrompt = None,
    sampler: Sampler = None,
    guidance: Guidance = None,
    steps: Steps = None,
    width: Width = None,
    height: Height = None,
    count: Annotated[int | None, typer.Option(min=1, help="With --prompts shapes: how many scenes (64).")] = None,
    scenes: Annotated[
        list[str],
        typer.Option(help="With --prompts shapes: base, heart, striped, blueprint; may be given several times (base)."),
    ] = [],
    rank_by: Annotated[
        str | None,
        typer.Option(
            help="A measure that says something of single pictures: checker (of shapes, without it), clip (of files), or my_measure.py:NAME.",
            rich_help_panel=RANKED,
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Which of its numbers, where a measure gives several.", rich_help_panel=RANKED)
    ] = None,
    all_pairs: Annotated[
        bool,
        typer.Option(
            "--all-pairs", help="Every two that differ, not the best and the worst alone.", rich_help_panel=RANKED
        ),
    ] = False,
    least: Annotated[
        float | None, typer.Option(min=0, help="By how much the two of a pair differ at least.", rich_help_panel=RANKED)
    ] = None,
    set: Annotated[
        list[str],
        typer.Option(
            "--set", help="What a measure is told, such as evaluation.clip_model=PATH.", rich_help_panel=RANKED
        ),
    ] = [],
    results: Results = Path("results"),
) -> None:
    """Make preference pairs for data.source preferences: draw several pictures of each prompt and let a measure choose, or take people's votes."""
    with readable_errors():
        from t2ilib.config import ConfigError
        from t2ilib.drawing.desk import Desk
        from t2ilib.drawing.preferences import SHAPES, draw_ranked, draw_votes, read_prompts
        from t2ilib.drawing.ranking import CHECKER, build_ranker
        from t2ilib.drawing.settings import build_settings

        changes = {"base": model, "config": config, "quantization": quantization}
        drawn: dict[str, Any] = {
            "num_pictures": num_pictures,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "sampler": sampler,
            "guidance_scale": guidance,
            "num_inference_steps": steps,
            "width": width,
            "height": height,
        }
        desk = Desk(results)
        if votes:
            given = [
                adapter,
                checkpoint,
                scale,
                partial,
                prompts,
                count,
                scenes,
                rank_by,
                metric,
                all_pairs,
                least,
                set,
            ]
            if any(value not in (None, [], False) for value in (*changes.values(), *drawn.values(), *given)):
                raise ConfigError(
                    "--votes say what was drawn, by what, and which was preferred: give nothing but OUT beside them"
                )
            with drawing_bar() as watch:
                made = draw_votes(desk, out, votes, watch)
        else:
            of_shapes = SHAPES in prompts
            if not of_shapes and (count or scenes):
                raise ConfigError("--count and --scenes are about --prompts shapes")
            asked = read_prompts(prompts, count or 64, scenes or ["base"], seed or 0)
            choices = chosen_adapters(adapter, scale, checkpoint, None, partial)
            values = {name: value for name, value in drawn.items() if value is not None}
            values |= {
                "model": chosen_base(choices, None, changes, results).model_dump(),
                "adapters": [choice.model_dump() for choice in choices],
            }
            settings = build_settings({"num_pictures": 4} | values, "the command")
            ranker = build_ranker(rank_by or (CHECKER if of_shapes else "clip"), metric, settings, of_shapes, set)
            with drawing_bar() as watch:
                made = draw_ranked(desk, out, asked, settings, ranker, least or 0.0, all_pairs, watch)
        print(f"{made.sentence()}\nin {out}; to train on them: data.source=preferences data.path={out}")
