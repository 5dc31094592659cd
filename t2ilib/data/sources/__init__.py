"""One file per source of captioned pictures; `manifest.SOURCES` names them."""
