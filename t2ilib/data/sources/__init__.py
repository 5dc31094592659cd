"""One file per source of captioned pictures, which `manifest.SOURCES` names, and how their tables and shards are read."""
