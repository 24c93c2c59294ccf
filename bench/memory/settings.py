"""What is measured: jobs that differ in what their memory depends on, the most telling first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One job on one GPU, as the sections of a manifest."""

    name: str
    shape: str
    method: str
    length: int
    """Tokens of a row."""
    rows: int | str
    """At a time; `auto`: as many as the planner finds."""
    checkpointing: str
    """`never`, `always`, `offload` or `auto`."""
    compiled: bool = False
    packed: bool = True
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Of the manifest's spec, beside the method: `layers`, `lora`, `quantization`; and fields of `training`."""

    @property
    def automatic(self) -> bool:
        """Whether the planner chooses how the job is run."""
        return self.rows == "auto"


_SHORT = {"never": "off", "always": "on", "offload": "offload", "auto": "auto"}


def _setting(
    kind: str, shape: str, length: int, rows: int | str, checkpointing: str = "never", **options: Any
) -> Setting:
    method, sections = _KINDS[kind]
    training = {**sections.get("training", {}), **options.pop("training", {})}
    parts = [kind, shape, f"{rows}x{length}", _SHORT[checkpointing]]
    parts += ["compiled"] if options.get("compiled") else []
    parts += ["masked"] if training.get("flashAttn") == "sdpa" else []
    parts += [] if options.get("packed", True) or "objective" in training else ["padded"]
    return Setting(
        "-".join(parts),
        shape,
        method,
        length,
        rows,
        checkpointing,
        sections={**sections, "training": training},
        **options,
    )


_FP8 = {"quantization": {"type": "fp8"}}
_KINDS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora_last8": ("lora", {"layers": {"last": 8}}),
    "nf4": ("qlora", {}),
    "fp8": ("qlora", _FP8),
    "freeze2": ("freeze", {"layers": {"last": 2}}),
    "full": ("full", {}),
    "ia3": ("ia3", {}),
    "bitfit": ("bitfit", {}),
    "dpo": ("lora", {"training": {"objective": "dpo"}}),
}
"""Methods with what makes them: the section `quantization`, `layers`, or an objective."""


def _table() -> Iterator[Setting]:
    yield _setting("lora", "8b", 2048, 2, "never")
    yield _setting("nf4", "8b", 2048, 1, "always")
    yield _setting("lora", "8b", 2048, 4, "always")
    yield _setting("full", "1b", 2048, 2, "never")
    yield _setting("lora", "8b", 2048, 2, "never", compiled=True)
    yield _setting("fp8", "8b", 2048, 2, "always")
    yield _setting("freeze2", "8b", 2048, 4, "never")
    yield _setting("lora", "8b", 8192, 1, "offload")
    yield _setting("nf4", "8b", 2048, 2, "never")
    yield _setting("nf4", "8b", 2048, 4, "offload")
    yield _setting("fp8", "8b", 2048, 2, "never")
    yield _setting("full", "1b", 2048, 4, "always")
    yield _setting("lora", "1b", 2048, 8, "never")
    yield _setting("lora", "8b", 512, 8, "never")
    yield _setting("lora", "8b", 2048, 1, "always")
    yield _setting("fp8", "8b", 2048, 2, "never", compiled=True)
    yield _setting("nf4", "8b", 2048, 2, "never", compiled=True)
    yield _setting("full", "1b", 8192, 1, "always")
    yield _setting("lora", "8b", 8192, 1, "always")
    yield _setting("lora", "8b", 2048, 4, "offload")
    yield _setting("freeze2", "8b", 8192, 1, "always")
    yield _setting("full", "1b", 512, 8, "never")
    yield _setting("nf4", "8b", 8192, 1, "always")
    yield _setting("ia3", "8b", 2048, 2, "never")
    yield _setting("lora", "1b", 8192, 2, "offload")
    yield _setting("lora", "1b", 2048, 2, "never", packed=False)
    yield _setting("lora", "1b", 2048, 4, "never", training={"flashAttn": "sdpa"})
    yield _setting("dpo", "1b", 512, 2, "never", packed=False)
    yield _setting("full", "1b", 2048, 2, "never", compiled=True)
    yield _setting("lora", "8b", 512, 1, "never")
    yield _setting("nf4", "8b", 512, 2, "never")
    yield _setting("fp8", "8b", 512, 4, "never")
    yield _setting("fp8", "8b", 2048, 4, "offload")
    yield _setting("lora_last8", "8b", 2048, 4, "never")
    yield _setting("freeze2", "1b", 2048, 8, "never")
    yield _setting("ia3", "1b", 2048, 4, "always")
    yield _setting("full", "1b", 512, 1, "never")
    yield _setting("lora", "1b", 512, 1, "always")
    yield _setting("dpo", "8b", 512, 1, "always", packed=False)
    yield _setting("full", "1b", 8192, 2, "offload")
    yield _setting("lora", "8b", 2048, "auto", "auto")
    yield _setting("full", "1b", 2048, "auto", "auto")


def _tiny() -> Iterator[Setting]:
    yield _setting("lora", "tiny", 128, 2, "never")
    yield _setting("full", "tiny", 128, "auto", "always")
    yield _setting("dpo", "tiny", 128, 2, "never", packed=False)


TABLE = tuple(_table())
TINY = tuple(_tiny())
"""The same on a CPU within seconds, to keep the bench alive."""
AUTO_BATCH = 32
"""Rows of an optimizer step where the planner chooses how many of them are computed at a time."""
