"""What sections of a recipe are made of: their base, numbers within bounds, a choice by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_serializer,
    model_validator,
)

__all__ = ["Choice", "Count", "Neutral", "Positive", "Section", "Seed"]

Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class Neutral:
    """Marks a field that was added after runs had been made without it.

    Where it has this value, a run computes what it computed before there was the field, so it is
    left out of the fingerprint, and fingerprints of existing runs stay what they were.
    """

    value: Any


class Choice(Section):
    """One of several registered things by name: `"sgd"`, or `{ kind = "momentum", decay = 0.9 }`.

    What is registered says which options there are.
    """

    kind: str
    options: dict[str, bool | int | float | str] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, dict) and "options" not in value:
            options = {key: option for key, option in value.items() if key != "kind"}
            return {**({"kind": value["kind"]} if "kind" in value else {}), "options": options}
        return value

    @model_serializer
    def _write(self) -> str | dict[str, Any]:
        return {"kind": self.kind, **self.options} if self.options else self.kind

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> Any:
        """As a recipe writes it, for any name; `runs.recipe_schema` has the registered ones."""
        scalar = {"type": ["boolean", "number", "string"]}
        table = {"type": "object", "properties": {"kind": {"type": "string"}}}
        table |= {"required": ["kind"], "additionalProperties": scalar}
        return {"anyOf": [{"type": "string"}, table]}
