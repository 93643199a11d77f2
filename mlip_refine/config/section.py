"""What all sections of a config share: strict types, no unknown keys, no change after reading."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlip_refine.config.units import problem


class Section(BaseModel):
    """Base of every section, and of the options of every loss."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """Read ``sampling:`` with nothing below it as a section of defaults."""
        return {} if value is None else value


def _as_paths(value: object) -> object:
    paths = (value,) if isinstance(value, str) else value
    good = isinstance(paths, list | tuple) and all(isinstance(path, str) and path for path in paths)
    if not good or not paths:
        raise problem("a path or a list of paths")
    return tuple(paths) if isinstance(paths, list | tuple) else paths


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_paths, json_schema_input_type=str | list[str])]
"""One path or several; stored as a tuple."""

Words = Annotated[tuple[str, ...], Field(strict=False)]
"""A list of texts; stored as a tuple."""

Count = Annotated[int, Field(ge=1, le=10**9)]
"""A whole number of at least one; what is larger is a slip of the pen."""

CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
"""A whole number, or none."""

Copies = Annotated[int, Field(ge=1, le=10_000)]
"""Number of copies of a system, which are all in memory at once."""

_SAFE_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def safe_word(value: object) -> object:
    """Let only names through that are safe as file names, also with what is put before and after them."""
    if isinstance(value, str) and not _SAFE_WORD.fullmatch(value):
        raise problem(
            "a word of at most 100 letters, digits, '.', '_' and '-' that starts with a letter or digit"
        )
    return value
