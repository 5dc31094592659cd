"""One file per source of captioned pictures. A source is a function `(DataConfig) -> (training records, held-out records)`."""

from t2ilib.data.sources import folder, shapes

SOURCES = {"folder": folder.load, "shapes": shapes.load}
