"""The base of every value that is written down or passed between packages."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable, strictly validated value. Unknown fields are errors; attribute docstrings are field
    descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)
