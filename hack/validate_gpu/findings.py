"""What a run showed, held against its twin: the run on one GPU, or the one without fast paths."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune_trainer.contract import ResultManifest
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.storage import ObjectStore, S3Uri
from validate_gpu.jobs import SLOW, STEPS, twin_of
from validate_gpu.launch import Ended

COMPARED = 10
"""Losses."""
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}
"""Of a loss, in nats: in bf16 DeepSpeed computes with 16-bit copies of the adapters, too."""
UNCOMPILED = 1e-1
"""Of a loss in bf16 to that in fp32, where blocks are not compiled: bf16 rounds away much of what an adapter adds in
its first steps (docs/validation/speed.md)."""


@dataclass
class Finding:
    """Of one run."""

    run: str
    code: int
    seconds: float
    losses: list[float] = field(default_factory=list)
    difference: float | None = None
    """Largest difference of a loss to that of the twin."""
    tensors: int = 0
    peak_mib: int = 0
    tokens_per_second: float = 0.0
    problems: list[str] = field(default_factory=list)

    def row(self) -> str:
        """A line of the table."""
        difference = "" if self.difference is None else f"{self.difference:.5f}"
        first = " ".join(f"{loss:.4f}" for loss in self.losses[:4])
        return (
            f"{self.run:20} exit {self.code:3} {self.seconds:6.1f} s  losses {first:32} difference {difference:8}"
            f" tensors {self.tensors:4} {self.peak_mib:6} MiB {self.tokens_per_second:9} tokens/s"
            f" {'FAILED' if self.problems else 'ok'}\n"
        )


def examine(
    run: str, ended: Ended, uri: S3Uri, store: ObjectStore, out: Path, twin: Finding | None, *, cpu: bool
) -> Finding:
    """What the run left behind: its losses, its artefact, and what is wrong with them."""
    finding = Finding(run, ended.code, round(ended.seconds, 1), peak_mib=ended.peak_mib)
    if ended.code != 0:
        last = [line for line in ended.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        finding.problems.append(f"exit code {ended.code}: {' '.join(last)[:400]}; see {ended.log}")
        return finding
    state = json.loads(store.get_bytes(uri.child("checkpoints", f"step-{STEPS}", "trainer_state.json")))
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    finding.losses = [entry["loss"] for entry in steps]
    finding.tokens_per_second = round(statistics.median(entry["tokens_per_second"] for entry in steps[2:]), 1)
    if not statistics.fmean(finding.losses[-3:]) < finding.losses[0]:
        finding.problems.append(f"nothing was learnt: the loss went from {finding.losses[0]} to {finding.losses[-1]}")
    if twin is not None and twin.losses:
        pairs = zip(finding.losses[:COMPARED], twin.losses[:COMPARED], strict=True)
        finding.difference = max(abs(one - other) for one, other in pairs)
        uncompiled = run.endswith(f"/{SLOW}") and not cpu
        if not finding.difference <= (UNCOMPILED if uncompiled else TOLERANCE["cpu" if cpu else "cuda"]):
            finding.problems.append(f"a loss differs by {finding.difference:.4f} from that of {twin.run}")
    elif twin_of(run) is not None:
        finding.problems.append(f"there is no {twin_of(run)} to compare with")
    manifest = ResultManifest.model_validate_json(store.get_bytes(uri.child("manifest.json")))
    store.get_tree(uri, manifest.files, out / run / "result")
    _examine_artefact(finding, manifest, out)
    return finding


def _examine_artefact(finding: Finding, manifest: ResultManifest, out: Path) -> None:
    """No tensor may be empty, none missing, and PEFT has to load what is an adapter."""
    folder = out / finding.run / "result" / manifest.artifact
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    finding.tensors = len(tensors)
    finding.problems += [f"{name} is empty" for name, tensor in tensors.items() if not tensor.numel()]
    if manifest.artifact != "adapter":
        return
    elements = sum(tensor.numel() for tensor in tensors.values())
    if elements != manifest.trainable_parameters:
        finding.problems.append(f"the adapter has {elements} elements, not {manifest.trainable_parameters}")
    if not any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name):
        finding.problems.append("nothing was learnt: every B is zero")
    with quiet_peft():
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "model"), str(folder))
