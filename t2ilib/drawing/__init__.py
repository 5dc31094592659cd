"""Pictures with what was trained, as a person asks for them: the functions under `t2ilib generate` and under whatever page shows them.

`settings`: all that a picture needs to be drawn again. `desk`: draws them, with a base and its adapters in memory (`loaded`), if there is room
for it (`fit`). `finding`, `checkpoints`: the adapters there are. `samplers`: by the names that people know. `pngtext`, `infotext`: what a
picture's file says of it. `grid`, `axes`: sheets of pictures along two axes. `voting`: two variants compared blind. Nothing here prints, asks
or serves.
"""
