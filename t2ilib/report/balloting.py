"""`t2ilib study ballot` and `study votes`: pairs of pictures of two variants to vote on, and the votes taken into the study's folder.

    ballots/<digest>.json, .html        what is voted on, and the page to vote on
    votes/<digest>.json                 the votes on it, as `drawing.voting` writes them

Only votes on a ballot that was made of this study are taken: same variants, adapters (by the digests of their files), prompts and noise.
The pictures are of one training run a variant, the first seed that both have unless another is asked for; what people say is about these
two runs.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2ilib.config import ConfigError, check_choice
from t2ilib.drawing.settings import DrawSettings, settings_of_run
from t2ilib.drawing.voting import Ballot, Votes, build_ballot, export_votes, import_votes, merge_votes
from t2ilib.evaluation.rows import read_rows
from t2ilib.report.ballot_page import ballot_digest, ballot_page
from t2ilib.runfile import load_run
from t2ilib.studies.file import load_study
from t2ilib.studies.runs import VOTES, StudyRun, plan_runs
from t2ilib.text import write_whole

BALLOTS, PICTURES = "ballots", "drawn"
PAIRS = 24
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """One side: a variant's run, at its end or at a checkpoint. `name`: as it stands in the ballot, "lora" or "lora@400"."""

    name: str
    run: StudyRun
    step: int | None


def make_ballot(
    file: Path,
    preset: str,
    between: Sequence[str],
    pairs: int,
    results: Path,
    prompts: Sequence[str] = (),
    seed: int | None = None,
    noise: int = 0,
    say: Say = lambda line: None,
) -> tuple[Path, Ballot]:
    """Draws the pairs of two variants (`lora`, or `lora@400` for a checkpoint) and writes the page; returns it with the ballot.

    `prompts`: without any, those that both runs were measured by, evenly; `seed`: of the training runs; `noise`: of the pictures. Raises
    ConfigError for variants that are not two, unknown or not trained, and as drawing does.
    """
    if len(between) != 2:
        raise ConfigError(f"a vote is between two variants: give --of twice, not {len(between)} times")
    one, other = contenders(file, preset, between, results, seed)
    asked, each = share_out({"asked": prompts} if prompts else common_prompts(one.run, other.run), pairs)
    ballot = build_ballot(
        ((one.name, settings_of(one)), (other.name, settings_of(other))), asked, seed=noise, num_pictures=each
    )
    folder = one.run.folder.parents[1]
    files = draw_pairs(ballot, folder / PICTURES, results, say)
    digest = ballot_digest(ballot)
    (folder / BALLOTS).mkdir(parents=True, exist_ok=True)
    export_votes(Votes(ballot), folder / BALLOTS / f"{digest}.json")
    page = folder / BALLOTS / f"{digest}.html"
    write_whole(page, ballot_page(ballot, files, str(file)))
    return page, ballot


def contenders(
    file: Path, preset: str, between: Sequence[str], results: Path, seed: int | None
) -> tuple[Contender, Contender]:
    """The two sides, of the same training seed."""
    study = load_study(file)
    named = [text.partition("@") for text in between]
    for name, _, _ in named:
        check_choice(name, study.variants, "--of: variant")
    steps = [step_of(text, step) if at else None for text, (_, at, step) in zip(between, named, strict=True)]
    runs = plan_runs(study, file, preset, results, [name for name, _, _ in named], [] if seed is None else [seed])
    there = {(run.variant, run.seed): run for run in runs if (run.folder / "result.json").is_file()}
    common = [run.seed for run in runs if all((name, run.seed) in there for name, _, _ in named)]
    if not common:
        told = ", ".join(f"{run.label} is {run.state}" for run in runs)
        raise ConfigError(f"{' and '.join(between)} have no finished training seed in common ({told})")
    one, other = (
        Contender(text, there[name, common[0]], step)
        for text, (name, _, _), step in zip(between, named, steps, strict=True)
    )
    return one, other


def step_of(text: str, step: str) -> int:
    if not step.isdecimal():
        raise ConfigError(f"--of {text!r}: write a variant, or a variant and a checkpoint of it, such as lora@400")
    return int(step)


def settings_of(side: Contender) -> DrawSettings:
    """How a side draws: as its run is measured, with what it trained."""
    from t2ilib.drawing.kept import choice_digest
    from t2ilib.drawing.loaded import DIGEST

    folder, run = side.run.folder, load_run(side.run.folder / "run.yaml")
    settings = settings_of_run(run)
    if run.trains == "adapter":
        choice = settings.changed(adapters=[{"path": str(folder), "step": side.step}]).adapters[0]
        digest = choice_digest(choice)[:DIGEST]
        return settings.changed(adapters=[choice.model_dump() | {"digest": digest}])
    if side.step is not None:
        raise ConfigError(f"--of {side.name}: {side.run.variant} trains {run.trains} and has no adapter of a step")
    if run.trains == "unet":
        model = {"base": str(folder / "model"), "dtype": run.model.dtype, "clip_skip": run.model.clip_skip}
        return settings.changed(model=model)
    return settings


def common_prompts(one: StudyRun, other: StudyRun) -> dict[str, list[str]]:
    """Group -> the prompts that both runs were measured by. Raises ConfigError where there are none."""
    told = [{row.prompt: row.group for row in read_rows(run.folder)} for run in (one, other)]
    groups: dict[str, list[str]] = {}
    for prompt, group in told[0].items():
        if prompt in told[1]:
            groups.setdefault(group, []).append(prompt)
    if not groups:
        raise ConfigError(f"{one.label} and {other.label} were measured by no common prompt: name some by --prompt")
    return groups


def share_out(groups: Mapping[str, Sequence[str]], pairs: int) -> tuple[list[str], int]:
    """So many prompts, of every group about as many and evenly, and so many pictures of each that there are `pairs` at least, and as few
    more as can be. Groups follow one another in turn."""
    left = {name: list(dict.fromkeys(prompts)) for name, prompts in groups.items()}
    each = math.ceil(pairs / sum(map(len, left.values())))
    count, chosen = math.ceil(pairs / each), []
    for place, (_, prompts) in enumerate(sorted(left.items(), key=lambda item: len(item[1]))):
        own = min(len(prompts), (count - sum(map(len, chosen))) // (len(left) - place))
        chosen.append([prompts[i * len(prompts) // own] for i in range(own)])
    turns = itertools.zip_longest(*sorted(chosen, key=len, reverse=True))
    return [prompt for turn in turns for prompt in turn if prompt is not None], each


def draw_pairs(ballot: Ballot, folder: Path, results: Path, say: Say) -> list[tuple[Path, Path]]:
    """The left and the right picture of every pair."""
    from t2ilib.drawing.desk import Desk
    from t2ilib.drawing.kept import draw_kept

    desk = Desk(results)
    files = draw_kept(desk, [one for pair in ballot.pairs() for one in pair.settings()], folder, say)
    desk.close()
    return list(zip(files[::2], files[1::2], strict=True))


def take_votes(file: Path, preset: str, votes: Sequence[Path], results: Path) -> list[tuple[Path, Votes, int]]:
    """Takes files of votes into the study's folder; returns, for each, where its votes lie now, all votes there, and how many were new.
    Nothing is written unless all files can be taken. Raises ConfigError for a file of votes on something else than this study's ballots."""
    study = load_study(file)
    check_choice(preset, study.presets, "preset")
    folder = results / f"{study.name}-{preset}"
    ballots = [import_votes(path).ballot for path in sorted((folder / BALLOTS).glob("*.json"))]
    if not ballots:
        raise ConfigError(
            f"{folder} has no ballot to vote on: make one by t2ilib study ballot {file} --of ... --of ..."
        )
    taken, changed = [], {}
    for path in votes:
        given = import_votes(path)
        ballot = belonging(path, given.ballot, ballots)
        target = folder / VOTES / f"{ballot_digest(ballot)}.json"
        if target not in changed:
            changed[target] = import_votes(target, ballot) if target.is_file() else Votes(ballot)
        taken.append((target, changed[target], merge_votes(changed[target], given)))
    for target, own in changed.items():
        export_votes(own, target)
    return taken


def belonging(path: Path, ballot: Ballot, ballots: Sequence[Ballot]) -> Ballot:
    """The one of the study's ballots that this is; raises ConfigError where it is none of them."""
    if ballot in ballots:
        return ballot
    alike = [own for own in ballots if own.names == ballot.names]
    import_votes(path, (alike or ballots)[-1])  # tells in what they differ
    raise ConfigError(f"{path} has votes on something else than this study's pictures")


def listing(folder: Path) -> list[Votes]:
    """All votes that a study's folder has, ballot by ballot."""
    return [import_votes(path) for path in sorted((folder / VOTES).glob("*.json"))]
