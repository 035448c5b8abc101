"""What every part of a recipe has in common: strict, frozen, and its field texts are the help."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One part of a recipe. Unknown keys are errors; values are never converted silently."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
