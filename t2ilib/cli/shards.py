"""`t2ilib data shard`: shards of any source."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2ilib.cli.errors import readable_errors

if TYPE_CHECKING:
    from t2ilib.config import RunConfig


def data_shard(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[SOURCE] OUT",
            help="A run config in YAML or what data.path takes, which --set can say too; and the folder for the shards.",
        ),
    ],
    set: Annotated[list[str], typer.Option("--set", help="section.field=value; may be given several times.")] = [],
    max_mb: Annotated[float, typer.Option(min=0.001, help="Megabytes of a shard, at most.")] = 512,
    shuffle: Annotated[
        int | None, typer.Option(min=0, metavar="SEED", help="Put the pictures in an order that this seed decides.")
    ] = None,
) -> None:
    """Write captioned pictures from any source as WebDataset shards with an index, which are read in any order, locally or remote."""
    with readable_errors():
        import yaml

        from t2ilib.config import ConfigError
        from t2ilib.data.manifest import load_listings
        from t2ilib.data.sharding import MB, write_shards
        from t2ilib.shapes import source

        if len(paths) > 2:
            raise ConfigError(f"{' '.join(paths)}: give a source and a folder for its shards")
        *given, out = paths
        run = described(given[0] if given else None, set)
        listing, apart = source.load(run.shapes) if run.data.source == "shapes" else load_listings(run.data)
        parts = {"path": (listing, Path(out))}
        if apart is not None:
            parts = {"path": (listing, Path(out) / "train"), "validation_path": (apart, Path(out) / "held-out")}
        section = {"source": "webdataset"}
        for field, (pictures, folder) in parts.items():
            done = write_shards(pictures, run.data, folder, round(max_mb * MB), shuffle)
            print(
                f"{done.pictures} pictures with {done.captions} captions in {done.shards} shard(s), {done.bytes / MB:,.1f} MB,"
                f" in {folder}" + f" ({done.kept} were there)" * bool(done.kept)
            )
            section |= {field: str(folder), **done.columns}
        print("\n" + yaml.safe_dump({"data": section}, sort_keys=False).rstrip())


def described(source: str | None, overrides: list[str]) -> "RunConfig":
    """A run that has the source as its data."""
    from t2ilib.runfile import build_run, load_run, override_values

    if source is not None and Path(source).suffix.lower() in (".yaml", ".yml"):
        return load_run(Path(source), overrides)
    values = {"adapter": {}, "data": {} if source is None else {"path": source}}
    return build_run(override_values(values, overrides), "what --set says")
