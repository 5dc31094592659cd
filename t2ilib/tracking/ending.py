"""How a run may end before its last step in good order: its state is in a checkpoint, and the same command goes on from there."""


class Stopped(SystemExit):
    """`code`: the process's exit status; `why`: a sentence; `status`: what MLflow calls the run meanwhile.

    A run that spent its time is SCHEDULED there, to go on; one that was told to stop, or had no room, is KILLED.
    """

    def __init__(self, code: int, why: str, status: str = "KILLED") -> None:
        super().__init__(code)
        self.why, self.status = why, status

    def __str__(self) -> str:
        return self.why
