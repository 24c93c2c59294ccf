"""A stand-alone model as ONNX, by torch's own exporter, proven with ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune_trainer.errors import InternalError, UsageError, first_line

FILE = "model.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LARGEST_RELATIVE_DIFFERENCE = 0.02
"""Of logits in ONNX Runtime to those of torch, over the largest logit: both round differently."""


class _Logits(nn.Module):
    """The part of a model that is exported: tokens to logits, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(rows, length) tokens and mask to (rows, length, vocabulary) logits."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        assert isinstance(logits, torch.Tensor)
        return logits


def check_onnx() -> None:
    """Raises UsageError where a library that the export needs is not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--format onnx needs {', '.join(missing)}: pip install 'finetune-operator[onnx]'")


def export_onnx(model: PreTrainedModel, folder: Path) -> float:
    """Write `model.onnx` in fp32, for any number of rows and any length, and run it once.

    Returns the largest difference of a logit to torch's. Raises InternalError where the two disagree, and UsageError
    where torch cannot export this architecture.
    """
    module = _Logits(model.float().eval())
    rows, length = torch.export.Dim("rows", min=1, max=1024), torch.export.Dim("length", min=2, max=_longest(model))
    shapes = {"input_ids": {0: rows, 1: length}, "attention_mask": {0: rows, 1: length}}
    tokens = _tokens(model, rows=2, length=8)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (tokens, torch.ones_like(tokens)),
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=shapes,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise UsageError(
            f"--format onnx: torch cannot export {type(model).__name__}: {first_line(error)}; use safetensors"
        ) from error
    assert program is not None
    program.save(str(folder / FILE))
    return _compare(module, folder)


def _compare(module: _Logits, folder: Path) -> float:
    import onnxruntime  # type: ignore[import-untyped]

    tokens = _tokens(module.model, rows=3, length=17)
    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()})[0]
    with torch.no_grad():
        expected = module(tokens, torch.ones_like(tokens))
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= _LARGEST_RELATIVE_DIFFERENCE * float(expected.abs().max()):
        raise InternalError(f"{FILE} does not compute what the model does: a logit differs by {difference:.3g}")
    return difference


def _tokens(model: PreTrainedModel, *, rows: int, length: int) -> torch.Tensor:
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def _longest(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 4096)


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Without what the exporter says of libraries that are not needed, and of its own names for dimensions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
