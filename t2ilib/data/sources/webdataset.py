"""WebDataset shards: tars in which files of one name, up to its first dot, are one sample. Local or behind any URL.

`cats/000017.jpg` with `cats/000017.txt`, `.caption` or `.json` is a captioned picture, whichever files lie between them;
`000017.mask.png` is its mask. Where each lies is known from the shard's index or its headers (`shardindex`), so pictures are read by
range, in any order, and a run resumes as with a folder. Every member is accounted for, as in a folder. Nothing is extracted.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from t2ilib.config import ConfigError, DataConfig
from t2ilib.data.records import Listing, Readable, Record, Told
from t2ilib.data.sources.archived import LARGEST
from t2ilib.data.sources.emphasis import as_repeats, as_weight, emphasised
from t2ilib.data.sources.files import is_hidden
from t2ilib.data.sources.sample import captions_of, chosen, json_of, parts_of, without_caption
from t2ilib.data.sources.shardindex import ENDING, TEXTS, Index, Member, indexes_of
from t2ilib.data.sources.spans import Span, find_files, is_remote, public
from t2ilib.data.sources.tar import leads_out
from t2ilib.data.sources.wording import unfit
from t2ilib.text import shown

log = logging.getLogger(__name__)

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
LISTED = 10


def load(config: DataConfig) -> Listing:
    """The samples of the shards that `config.path` names, but for those of `config.validation_path`, in the order of the shards
    and of their place there. Raises ConfigError for shards that are not there, or that break off where `config.on_error` is stop.
    """
    if config.streaming:
        raise ConfigError(
            "data.streaming is for training: leave it out, and all that lies in the shards is told at once"
        )
    account = Account(config)
    account.add_all(account.own_shards())
    return account.listing()


def reason(error: OSError) -> str:
    return "is not there" if isinstance(error, FileNotFoundError) else shown(error.strerror or error)


def lines(texts: list[str]) -> str:
    return "\n  ".join(texts[:LISTED] + [f"... and {len(texts) - LISTED} more"] * (len(texts) > LISTED))


class Account:
    """What becomes of everything in the shards, one after another."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.records: list[Record] = []
        self.texts: list[Readable] = []
        self.hidden: list[Readable] = []
        self.aside: list[Told] = []
        self.rejected: list[Told] = []
        self.prompted = 0
        self.fields: Counter[str] = Counter()

    def own_shards(self) -> list[str]:
        """The shards of `config.path` but for those of `config.validation_path`."""
        if self.config.path is None:
            raise ConfigError(
                "data.path is missing: give shards, as a folder, a .tar, a pattern (shard-{000000..000012}.tar) or a URL"
            )
        if self.config.split is not None:
            raise ConfigError("data.split: shards have no parts by name; name the shards of a part in data.path")
        shards = self.find(self.config.path)
        if self.config.validation_path is None:
            return shards
        apart = {*type(self)(self.config).find(self.config.validation_path)}
        if apart == {*shards}:
            raise ConfigError("data.validation_path names the same shards as data.path")
        return [url for url in shards if url not in apart] or shards  # held-out shards may lie among the others

    def find(self, where: str) -> list[str]:
        """The shards that a path names; what else lies there is accounted for."""
        named, found, folders = find_files(where)
        shards, packed = [*named], [path for path in named if is_compressed(path)]
        for path in found:
            if is_hidden(file_of(path).name):
                self.hidden.append(file_of(path))
            elif is_compressed(path):
                packed.append(path)
            elif public(path).lower().endswith(".tar"):
                shards.append(path)
            elif path.endswith(ENDING):
                self.texts.append(file_of(path))
            else:
                self.aside.append((file_of(path), "is no shard (.tar)"))
        if packed:
            names = lines([public(path) for path in packed])
            raise ConfigError(
                f"data.path: compressed shards cannot be read in any order:\n  {names}\nDecompress them once (gunzip, unxz, unzstd);"
                " pictures hardly get smaller by it"
            )
        inside = [(file_of(path), "is a folder: name its shards by a pattern, such as */*.tar") for path in folders]
        self.aside += [told for told in inside if not is_hidden(told[0].name)]
        if not shards:
            there = [f"{path} {why}" for path, why in self.aside]
            raise ConfigError(f"data.path {public(where)} has no shards (.tar)" + f":\n  {lines(there)}" * bool(there))
        return [*dict.fromkeys(shards)]

    def add_all(self, shards: Sequence[str]) -> None:
        """The samples of shards; logs how each was known."""
        absent, broken, origins = [], [], Counter()
        for url, index in zip(shards, indexes_of(shards), strict=True):
            if isinstance(index, OSError):
                absent.append(f"{public(url)}: {reason(index)}")
                continue
            broken += [f"{public(url)} {index.broken}"] if index.broken else []
            origins[index.origin] += 1
            if not absent:
                self.add(url, index)
        if absent:
            raise ConfigError(f"data.path: {len(absent)} of {len(shards)} shards cannot be read:\n  {lines(absent)}")
        if broken and self.config.on_error == "stop":
            raise ConfigError(
                f"data.path: {len(broken)} of {len(shards)} shards cannot be read to their end:\n  {lines(broken)}\nDownload or"
                " write them anew, or set data.on_error to skip to use what lies before"
            )
        log.info("%d shard(s), by %s", len(shards), ", ".join(f"{origin} ({n})" for origin, n in origins.items()))

    def add(self, url: str, index: Index) -> None:
        """The samples of a shard."""
        samples: dict[str, dict[str, Member]] = {}
        if index.broken:
            self.rejected.append((file_of(url), index.broken))
        for member in index.members:
            if not member.name:
                self.rejected.append((file_of(url), member.fault or "has no name"))
                continue
            key, ending = parts_of(member.name)
            outside = leads_out(member.name)
            fault = outside or member.fault
            if not outside and any(is_hidden(part) for part in member.name.split("/") if part != "."):
                self.hidden.append(self.place(url, member))
            elif member.size > LARGEST and not fault:
                self.rejected.append((self.place(url, member), f"has {member.size} bytes: it cannot be a picture"))
            elif fault and ending not in TEXTS:
                self.rejected.append((self.place(url, member), fault))
            elif not ending:
                self.aside.append((self.place(url, member), "has no ending that says what it is"))
            elif ending in samples.setdefault(key, {}):
                self.rejected.append(
                    (self.place(url, member), "is there again under the same name: only the first counts")
                )
            else:
                samples[key][ending] = member._replace(fault=fault) if fault else member
        for files in samples.values():
            self.add_sample(url, files)

    def place(self, url: str, member: Member) -> Readable:
        """Where a member's bytes are read."""
        return Span(url, member.offset, member.size, member.name, member.crc)

    def add_sample(self, url: str, files: dict[str, Member]) -> None:
        """`files` of a sample by their endings, in order."""
        texts = [ending for ending in files if ending in TEXTS]
        picture, mask, wrong = chosen(files, self.config)
        if picture is None:
            self.rejected += [(self.place(url, files[ending]), wrong) for ending in texts]
        else:
            self.texts += [self.place(url, files[ending]) for ending in texts]
            if wrong is None:
                try:
                    self.records.append(self.record(url, files, picture, mask))
                except ValueError as error:
                    wrong = str(error)
            if wrong is not None:
                self.rejected.append((self.place(url, files[picture]), wrong))
        used = {picture, mask, *texts}
        self.aside += [
            (self.place(url, files[e]), "neither the picture nor a caption of it") for e in files if e not in used
        ]

    def record(self, url: str, files: dict[str, Member], picture: str, mask: str | None) -> Record:
        """Raises ValueError that says why there is none."""
        told = json_of(files)
        self.fields.update(told.keys())
        captions = captions_of(files, told, self.config.caption_column)
        if captions is None:
            if self.config.prompt is None:
                raise ValueError(without_caption(told, self.config.caption_column))
            captions = (self.config.prompt.strip(),)
            self.prompted += 1
        if wrong := unfit(captions):
            raise ValueError(wrong)
        weight, repeats = told.get(self.config.weight_column), told.get(self.config.repeat_column)
        scene = told.get("scene")
        return Record(
            self.place(url, files[picture]),
            captions[0],
            scene if isinstance(scene, dict) else None,
            captions[1:],
            mask and self.place(url, files[mask]),
            1.0 if (number := as_weight(weight)) is None else number,
            as_repeats(repeats) or 1,
        )

    def require_columns(self) -> None:
        """Raises ConfigError for a column that no sample had so far."""
        for field in ("weight_column", "repeat_column"):
            column = getattr(self.config, field)
            if column is not None and self.records and not self.fields[column]:
                there = (
                    f"they have {', '.join(sorted(map(shown, self.fields))[:LISTED])}"
                    if self.fields
                    else "there is none"
                )
                raise ConfigError(f"data.{field}: no .json of a sample has {column!r} ({there})")
        if self.config.mask_column is not None and self.records and not any(record.mask for record in self.records):
            raise ConfigError(f"data.mask_column: no sample has a picture .{self.config.mask_column}.png or the like")

    def listing(self) -> Listing:
        where = public(self.config.path)
        if not self.records and not self.rejected:
            raise ConfigError(f"{where} has no picture in its shards")
        self.require_columns()
        if self.prompted:
            log.info(
                "%s: %d of %d pictures have no caption and take data.prompt", where, self.prompted, len(self.records)
            )
        records = self.records and emphasised(
            self.records, [record.path.member for record in self.records], where, self.config
        )
        return Listing(
            where if is_remote(where) else Path(where),
            tuple(records),
            tuple(self.texts),
            tuple(self.hidden),
            tuple(self.aside),
            tuple(self.rejected),
        )


def file_of(url: str) -> Readable:
    return Span(url, 0, 0) if is_remote(url) else Path(url)


def is_compressed(url: str) -> bool:
    return public(url).lower().endswith(COMPRESSED)
