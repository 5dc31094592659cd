"""Folders of preference pairs (`data.source: preferences`): drawn and ranked by a measure, or drawn again as people voted on them.

    OUT/preferences.jsonl    a row a pair: chosen, rejected, text, and what decided
    OUT/pictures/            every picture that was drawn, under a digest of all that decides it (`kept`)
    OUT/README.md            by what they were drawn and ranked, and what was left out

Pictures of a prompt come from different noise by one model, as Diffusion-DPO's AI feedback has them (arXiv 2311.12908); of a vote both
come from the same noise by two. What was interrupted goes on: pictures that are there are not drawn again, and ranking others of them, or
otherwise, costs no drawing. The table is written last, and whole.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2ilib.config import ConfigError
from t2ilib.data.sources.preferences import CHOSEN, REJECTED, TABLE, TEXT
from t2ilib.drawing.desk import Desk, Watch
from t2ilib.drawing.finding import REGISTERED, resolve
from t2ilib.drawing.kept import choice_digest, draw_kept
from t2ilib.drawing.loaded import DIGEST
from t2ilib.drawing.ranking import Ranker, ranked_pairs
from t2ilib.drawing.settings import AdapterChoice, DrawSettings
from t2ilib.drawing.voting import TIE, Votes, import_votes, majority, merge_votes
from t2ilib.locking import held
from t2ilib.shapes.world import Scene, caption, mixed_scenes
from t2ilib.text import read_text, shown, write_whole

SHAPES = "shapes"
PICTURES, README = "pictures", "README.md"
MARK = "Written by `t2ilib data preferences`."


@dataclass(frozen=True)
class Prompts:
    """`texts`, each once; `scenes`: what they ask for, where all are of the drawn world."""

    texts: tuple[str, ...]
    scenes: tuple[Scene, ...] | None = None


@dataclass(frozen=True)
class Pairs:
    """What a folder holds. `rows`: of its table; `of`: what they were made of, in words; `left_out`: what was not made a pair of -> how many;
    `told`: what made them, as plain data."""

    folder: Path
    rows: list[dict[str, Any]]
    of: str
    left_out: dict[str, int]
    told: dict[str, Any]

    def sentence(self) -> str:
        """What came of it."""
        left = ", ".join(f"{count} {what}" for what, count in self.left_out.items() if count)
        return f"{len(self.rows)} pair{'s' * (len(self.rows) != 1)} of {self.of}{f'; left out: {left}' * bool(left)}"


def read_prompts(sources: Sequence[str], count: int, scenes: Sequence[str], seed: int) -> Prompts:
    """The prompts of files, a line each, or with "shapes" `count` scenes of the drawn world, of the kinds `scenes`: of those that are trained on, so
    that none is one that the checker tests. Raises ConfigError for files without any, and for more scenes than there are."""
    if not sources:
        raise ConfigError("there is nothing to draw: give --prompts, a file with a prompt a line, or shapes")
    if SHAPES in sources:
        if len(sources) > 1:
            raise ConfigError("--prompts shapes are prompts of which it is known what they ask for: give it alone")
        found = mixed_scenes(count, "train", seed, scenes)
        if len(set(found)) < count:
            raise ConfigError(f"--count {count}: of {', '.join(scenes)} the drawn world has fewer: lower it")
        return Prompts(tuple(caption(scene) for scene in found), tuple(found))
    texts: dict[str, None] = {}
    for source in sources:
        try:
            lines = [line.strip() for line in read_text(Path(source)).splitlines()]
        except FileNotFoundError:
            raise ConfigError(
                f"--prompts {source}: there is no such file; write {SHAPES} for the drawn world"
            ) from None
        if not any(lines):
            raise ConfigError(f"--prompts {source}: the file is empty: write a prompt a line")
        texts |= dict.fromkeys(filter(None, lines))
    return Prompts(tuple(texts))


def draw_ranked(
    desk: Desk,
    out: Path,
    prompts: Prompts,
    settings: DrawSettings,
    ranker: Ranker,
    least: float = 0.0,
    every: bool = False,
    watch: Watch | None = None,
) -> Pairs:
    """Draws `settings.num_pictures` pictures of each prompt, and writes pairs of better and worse ones (`ranked_pairs`) into `out`.

    Raises ConfigError for one picture a prompt, for a folder that is another's or in use, where no pair comes of it, and as drawing and
    ranking do.
    """
    number = settings.num_pictures
    if number < 2:
        raise ConfigError("--num-pictures 1: a pair is two pictures of a prompt; draw more of each")
    with claimed(out):
        asked = placed(singles(settings, prompts.texts), desk)
        files = draw_kept(desk, asked, out / PICTURES, watch=watch)
        scenes = [scene for scene in prompts.scenes for _ in range(number)] if prompts.scenes else None
        metric, values = ranker.values(files, [one.prompt for one in asked], scenes, desk.loaded, asked[0])
        rows, ties, unknown = [], 0, 0
        for text, start in zip(prompts.texts, range(0, len(files), number), strict=True):
            own, of_prompt = values[start : start + number], files[start : start + number]
            pairs = ranked_pairs(own, least, every)
            known = sum(value is not None for value in own)
            unknown, ties = unknown + (known < 2), ties + (known > 1 and not pairs)
            rows += [
                row(of_prompt[one], of_prompt[other], text, by=metric, values=[own[one], own[other]])
                for one, other in pairs
            ]
        ranked = {"by": ranker.name, "metric": metric, "pairs": "all that differ" if every else "best against worst"}
        told = {
            "prompts": SHAPES if prompts.scenes else "of files",
            "drawn": drawn_by(asked[0], number),
            "ranked": ranked | {"least": least},
        }
        alike = (
            f"prompts whose pictures differ by less than {least:g}"
            if least
            else "prompts whose pictures are all as good"
        )
        left = {alike: ties, "prompts of which fewer than two pictures have a value": unknown}
        return written(Pairs(out, rows, f"{len(prompts.texts)} prompts", left, told))


def singles(settings: DrawSettings, texts: Sequence[str]) -> list[DrawSettings]:
    """Settings of each picture of each prompt alone; noise is numbered over all of them."""
    of_prompts = (
        settings.model_copy(update={"prompt": text, "first": settings.first + place * settings.num_pictures})
        for place, text in enumerate(texts)
    )
    return [single for own in of_prompts for single in own.pictures()]


def draw_votes(desk: Desk, out: Path, files: Sequence[Path], watch: Watch | None = None) -> Pairs:
    """Draws again what people voted on, and writes a pair for each pair of pictures that most of its votes decided.

    Raises ConfigError for files that hold no votes, for adapters that are not what was voted on, and as `draw_ranked`.
    """
    with claimed(out):
        ballots, decided, left = merged(files), [], Counter[str]()
        for votes in ballots:
            own, others = decisions(votes)
            decided, left = decided + own, left + others
        asked = placed([side for sides, _ in decided for side in sides], desk)
        require_adapters(asked)
        drawn = draw_kept(desk, asked, out / PICTURES, watch=watch)
        rows = {
            (chosen, rejected): row(chosen, rejected, sides[0].prompt, by="votes", **told)
            for chosen, rejected, (sides, told) in zip(drawn[::2], drawn[1::2], decided, strict=True)
        }  # of ballots that share a pair, one
        count = sum(len(votes.ballot.pairs()) for votes in ballots)
        told = {"voted_on": [votes.ballot.model_dump(mode="json") for votes in ballots]}
        return written(Pairs(out, [*rows.values()], f"{count} that were to be voted on", dict(left), told))


def decisions(votes: Votes) -> tuple[list[tuple[tuple[DrawSettings, DrawSettings], dict[str, Any]]], Counter[str]]:
    """What draws the chosen and the rejected picture of each pair of a ballot that its votes decided, with how they stood; and how many pairs
    have no such."""
    choices, decided, left = defaultdict(list), [], Counter[str]()
    for vote in votes.votes:
        choices[vote.pair].append(vote.choice)
    for pair in votes.ballot.pairs():
        own = choices[pair.number]
        winner = majority(own)
        if winner == TIE:
            left["that no majority decided" if own else "that nobody voted on"] += 1
            continue
        sides = pair.settings() if winner == pair.left else pair.settings()[::-1]
        loser = pair.right if winner == pair.left else pair.left
        decided.append((sides, {"variants": [winner, loser], "votes": [own.count(winner), own.count(loser)]}))
    return decided, left


def merged(files: Iterable[Path]) -> list[Votes]:
    """The votes of files, ballot by ballot."""
    ballots: list[Votes] = []
    for file in files:
        votes = import_votes(file)
        known = next((own for own in ballots if own.ballot == votes.ballot), None)
        if known is None:
            ballots.append(votes)
        else:
            merge_votes(known, votes)
    return ballots


def placed(settings: Sequence[DrawSettings], desk: Desk) -> list[DrawSettings]:
    """The same with adapters of MLflow's registry as the files that they are."""
    known: dict[AdapterChoice, AdapterChoice] = {}
    for choice in {choice for one in settings for choice in one.adapters}:
        if choice.path.startswith(REGISTERED):
            place = resolve(choice, desk.loaded.results, desk.loaded.uri)
            known[choice] = choice.model_copy(update={"path": str(place)})
    return [
        one.model_copy(update={"adapters": tuple(known.get(choice, choice) for choice in one.adapters)})
        for one in settings
    ]


def require_adapters(settings: Iterable[DrawSettings]) -> None:
    """Raises ConfigError for an adapter that is another now than the one whose pictures people saw."""
    for choice in dict.fromkeys(choice for one in settings for choice in one.adapters):
        now = choice_digest(choice)[:DIGEST]
        if choice.digest not in (None, now):
            raise ConfigError(
                f"{choice.path} is another adapter now ({now}) than the one that was voted on ({choice.digest}): its pictures would be others"
            )


def claimed(out: Path) -> AbstractContextManager[None]:
    """Holds the folder; raises ConfigError for one whose table somebody else wrote."""
    if (out / TABLE).exists() and MARK not in (read_text(out / README) if (out / README).is_file() else ""):
        raise ConfigError(f"{shown(out / TABLE)} was not written by this command: choose another folder")
    return held(out / ".lock", f"another process draws pairs into {shown(out)}: wait for it")


def row(chosen: Path, rejected: Path, text: str, **more: Any) -> dict[str, Any]:
    names = (f"{PICTURES}/{file.name}" for file in (chosen, rejected))
    return dict(zip((CHOSEN, REJECTED, TEXT), (*names, text), strict=True)) | more


def drawn_by(settings: DrawSettings, number: int) -> dict[str, Any]:
    """How the pictures of a command were drawn, but for their prompts."""
    told = settings.model_dump(mode="json", exclude={"prompt"}) | {"num_pictures": number}
    told["adapters"] = [
        choice.model_dump(mode="json") | {"digest": choice_digest(choice)[:DIGEST]} for choice in settings.adapters
    ]
    return told


def written(pairs: Pairs) -> Pairs:
    """Writes what is there and where it is from, and then the table; raises ConfigError where there is no pair."""
    if not pairs.rows:
        raise ConfigError(
            f"{shown(pairs.folder)}: {pairs.sentence()}. Draw more pictures of each, rank by another"
            " measure, or let a model draw that is less sure of itself"
        )
    yaml = f"data: {{source: preferences, path: {json.dumps(str(pairs.folder), ensure_ascii=False)}}}"
    text = f"""# Preference pairs

{pairs.sentence()}. {MARK}

To train on them:

```yaml
{yaml}
```

By what they were drawn and ranked:

```json
{json.dumps(pairs.told, indent=1, ensure_ascii=False)}
```
"""
    write_whole(pairs.folder / README, text)
    lines = [json.dumps(row, ensure_ascii=False) for row in pairs.rows]
    write_whole(pairs.folder / TABLE, "".join(f"{line}\n" for line in lines))
    return pairs
