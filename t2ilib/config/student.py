"""The section about a smaller network: what of the base's UNet is left out."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from t2ilib.config.section import Section

Part = Literal["second_layers", "mid_block", "innermost_stage"]


class StudentConfig(Section):
    """A UNet with some of the base's blocks, whose weights it begins with, and which learns to do without the others (BK-SDM, arXiv 2305.15798,
    sec. 3.1)."""

    leave_out: Annotated[tuple[Part, ...], Field(min_length=1)]
    """second_layers: of every stage that has two or more, one pair of residual and attention layers, in the decoder the second of the pairs
    (BK-SDM-Base). mid_block: the block between encoder and decoder (BK-SDM-Small leaves it out too). innermost_stage: the stage of the lowest
    resolution, of encoder and decoder (BK-SDM-Tiny leaves that out too)."""

    @field_validator("leave_out")
    @classmethod
    def each_once(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if twice := sorted({part for part in parts if parts.count(part) > 1}):
            raise ValueError(f"{', '.join(twice)} is named twice: name each part once")
        return parts

    def require(self, run: Any) -> None:
        """Raises ValueError for a run that cannot train one."""
        if run.trains != "unet":
            raise ValueError(
                f"the student section is about training a UNet, and this run trains {run.trains}: set student to null, or, for an adapter of"
                " a student, train that first and name its folder in model.base"
            )
        if run.scratch is not None:
            raise ValueError(
                "a student begins with the weights of its base, and scratch with fresh ones: leave one out"
            )
