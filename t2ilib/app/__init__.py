"""The app: a page in the browser over `t2ilib.drawing`, for drawing with what was trained, and choosing by eye.

`page` is the whole of it, `panel` the settings that all tabs share, `draw`, `checkpoints`, `grid` and `compare` a tab each. `asking` turns what
the page holds into settings and back, `choices` says what there is to choose from, `steps` and `blind` what the tabs of those names draw.
`visitors` keeps what one visitor's page is about, `studio` what all share, `wording` writes what the page tells, `serving` starts the server and
says what it gives out.

Gradio, an extra of the package, is imported by `page` and the tabs alone. Nothing here draws, loads or reads pictures by itself.
"""
