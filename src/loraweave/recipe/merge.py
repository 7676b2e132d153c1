"""Experts that a recipe makes by merging others.

```yaml
merged:
  both: {method: ties, experts: {qa: loras/qa, nli: loras/nli}, density: 0.3, weights: {qa: 0.5}}
  less: {arithmetic: qa - 0.4*nli, experts: {qa: loras/qa, nli: loras/nli}}
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field, model_validator

from loraweave.errors import LoraweaveError, unknown
from loraweave.recipe.parts import Part

if TYPE_CHECKING:
    from loraweave.experts.types import Expert


class Merge(Part):
    """One merged expert: a merging method with any of its options beside it, or arithmetic."""

    model_config = ConfigDict(extra="allow")

    experts: dict[str, str] = Field(description="name -> PEFT folder, hub id or zoo:NAME")
    method: str | None = Field(default=None, description="concat, ties, svd ...; further fields are its options")
    arithmetic: str | None = Field(default=None, description="instead of a method: a - 0.4*b; option: space")
    weights: dict[str, float] = Field(default={}, description="strength of some experts; the others have 1")

    @model_validator(mode="after")
    def _possible(self) -> Merge:
        from loraweave.transforms import checks, registry
        from loraweave.transforms.expression import read_expression
        from loraweave.transforms.types import Space

        if (self.method is None) == (self.arithmetic is None):
            raise LoraweaveError("expected either 'method' or 'arithmetic'")
        if not self.experts:
            raise LoraweaveError("expected at least one expert, got none")
        if self.method is not None:
            registry.build(self.method, self._options())
            named = self.weights
        else:
            if "weights" in self.model_fields_set:
                raise LoraweaveError("weights: they go with a method; write them into the arithmetic itself")
            for option in self._options():
                if option != "space":
                    raise unknown("option of arithmetic", option, ["space"])
            checks.choice("arithmetic", "space", self._options().get("space", "delta"), Space)
            named = read_expression(str(self.arithmetic))
        for name in named:
            if name not in self.experts:
                raise unknown("expert", name, self.experts)
        return self

    def expert(self, name: str) -> Expert:
        """Read the experts and merge them."""
        from loraweave.transforms.merge import arithmetic, merge

        if self.method is not None:
            return merge(self.experts, self.method, weights=self.weights, name=name, **self._options())
        return arithmetic(str(self.arithmetic), self.experts, name=name, **self._options())

    def placed(self, place: Callable[[str], str]) -> Merge:
        """The same with every source as ``place`` says."""
        return self.model_copy(update={"experts": {name: place(source) for name, source in self.experts.items()}})

    def _options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
