"""The README card of a saved mixture, as the hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraweave.mixture import Mixture


def card(mixture: Mixture, results: Mapping[str, Any] | None = None) -> str:
    """The README of a saved mixture."""
    base = getattr(mixture.model, "name_or_path", "") or type(mixture.pipeline or mixture.model).__name__
    use = "mixture.model.generate(**inputs)" if mixture.pipeline is None else 'mixture.pipeline("a prompt").images[0]'
    lines = [
        "---",
        "library_name: loraweave",
        "tags: [lora, mixture-of-experts]",
        "---",
        "",
        f"# {len(mixture.experts)} LoRAs on {Path(base).name}, mixed by `{mixture.policy.name}`",
        "",
        "| expert | from |",
        "| --- | --- |",
        *(
            f"| {e.name} | {Path(e.source).name if Path(e.source).is_absolute() else e.source} |"
            for e in mixture.sources
        ),
        "",
        "```python",
        "import loraweave as lw",
        "",
        'mixture = lw.load("this-folder")',
        use,
        "```",
        "",
    ]
    if results is not None:
        from loraweave.reporting.tables import to_markdown

        lines += ["## Results", "", to_markdown(results), ""]
    return "\n".join(lines)
