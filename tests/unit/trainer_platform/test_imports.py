"""Packages that a run can do without are not imported, and are there for whoever needs them afterwards."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import imports
from finetune_trainer.imports import not_needed, without
from tests.trainer_jobs import trainer_config

NF4 = {"method": "qlora", "quantization": {"type": "nf4"}}
FP8 = {"method": "qlora", "quantization": {"type": "fp8"}}


@pytest.mark.parametrize(
    ("changes", "spared"),
    [
        ({}, True),
        (FP8, True),
        (NF4, False),
        ({"training": {"optimizer": "paged_adamw_8bit"}}, False),
        ({"training": {"optimizer": "sgd"}}, True),
    ],
    ids=["lora", "fp8", "nf4", "8-bit optimizer", "sgd"],
)
def test_what_a_run_needs(changes: dict[str, Any], spared: bool, tmp_path: Path) -> None:
    found = not_needed(trainer_config(tmp_path, tmp_path, **changes))
    assert ("bitsandbytes" in found) is spared
    assert {"datasets", "scipy"} <= found


def test_a_package_is_missing_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spare_package.py").write_text("there = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "_remember", lambda: None)  # this process runs other tests, too
    with without({"spare_package"}):
        assert importlib.util.find_spec("spare_package") is None
        with pytest.raises(ImportError):
            importlib.import_module("spare_package")
    assert importlib.import_module("spare_package").there
    with without({"spare_package"}):
        assert importlib.import_module("spare_package").there, "what is in use already stays"
    with pytest.raises(ZeroDivisionError), without({"spare_other"}):
        raise ZeroDivisionError
    assert "spare_other" not in sys.modules
    del sys.modules["spare_package"]


def test_what_names_a_result_is_read_without_torch() -> None:
    """`finetune merge` says at once that there is no such result."""
    code = "import sys, finetune_trainer.merging.result_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_trainer_starts_without_them() -> None:
    """In a process of its own, as a run does it."""
    code = """
import sys
from finetune_trainer.imports import without
with without({"bitsandbytes", "datasets", "scipy"}):
    import finetune_trainer.train
import peft, transformers
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **sizes))
peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
heavy = {"bitsandbytes", "datasets", "pandas", "scipy", "torch._inductor.compile_fx"} & set(sys.modules)
assert not heavy, heavy
import scipy.optimize
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=280)
