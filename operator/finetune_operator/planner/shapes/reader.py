"""Reads a `config.json` with errors that name the key. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.errors import PlanningError

_LARGEST = 2**31 - 1
MAX_EXPERTS = 65_536
_DROPOUT = ("dropout", "pdrop", "dropout_prob", "dropout_rate")
_NOT_IN_BLOCKS = ("emb", "classifier", "summary")


class ConfigReader:
    """One object of a configuration."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            raise PlanningError(f"config.json: {prefix.rstrip('.') or 'the file'} is not an object")
        self._values = values
        self._prefix = prefix

    def error(self, key: str, problem: str) -> PlanningError:
        """A PlanningError that blames a key."""
        return PlanningError(f"config.json: {self._prefix}{key}: {problem}")

    def number(self, key: str, default: int | None = None, *, largest: int = _LARGEST, least: int = 1) -> int:
        """A whole number; null counts as absent. Without a default the key has to be there."""
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "missing; this does not look like the configuration of a whole model")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
            raise self.error(key, f"{_shown(value)} is not a whole number from {least} to {largest}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null counts as absent."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"{_shown(value)} is not true or false")
        return value

    def text(self, key: str) -> str:
        """A text that has to be there."""
        value = self._values.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, f"{_shown(value)} is not a text" if key in self._values else "missing")
        return value

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; null counts as empty."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in value):
            raise self.error(key, f"{_shown(value)} is not a list of whole numbers")
        return tuple(value)

    def part(self, key: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """A nested object."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, Mapping):
            raise self.error(key, "missing" if value is None else f"{_shown(value)} is not an object")
        return value

    def below(self, key: str) -> ConfigReader:
        """A reader of a nested object."""
        return ConfigReader(self.part(key), f"{self._prefix}{key}.")

    def is_silu(self) -> bool:
        """Whether the MLP's activation is SiLU, the default of most families with a gate."""
        default = "gelu" if str(self._values.get("model_type")).startswith("gemma") else "silu"
        found = self._values.get("hidden_activation") or self._values.get("hidden_act") or default
        return found in ("silu", "swish")

    def has_dropout(self) -> bool:
        """Whether blocks drop anything in training (`attention_dropout`, `resid_pdrop` and the like)."""
        return any(
            isinstance(value, int | float) and value > 0
            for name, value in self._values.items()
            if name.endswith(_DROPOUT) and not name.startswith(_NOT_IN_BLOCKS)
        )

    def is_stepwise_gelu(self, key: str) -> bool:
        """Whether an activation is `gelu_new`, the default of the families that have it, or its like."""
        return self._values.get(key, "gelu_new") in ("gelu_new", "gelu_fast", "gelu_accurate")

    def divided(self, key: str, by: str) -> int:
        """The quotient of two numbers. Raises PlanningError where it is no whole number."""
        dividend, divisor = self.number(key), self.number(by)
        if dividend % divisor:
            raise self.error(by, f"{divisor} does not divide {key} {dividend}")
        return dividend // divisor


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
