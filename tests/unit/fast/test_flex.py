"""What FlexAttention is told of samples, and what it computes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from finetune_trainer.fast import attention
from finetune_trainer.fast.attention import choice, flex, trial
from finetune_trainer.fast.attention.flex import BLOCK, FLEX, sample_blocks
from finetune_trainer.fast.attention.kernel import Samples, Scores
from finetune_trainer.fast.attention.reference import one_by_one
from tests.compiling import compile_by
from tests.unit.fast.test_attention_kernels import HEADS
from tests.unit.fast.test_training import assert_same, trained
from tests.unit.trainer_core.conftest import ModelFolder

CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.mark.parametrize("window", [0, 1, 50, 128, 200, 1000])
@pytest.mark.parametrize("lengths", [(700,), (128, 128, 256), (1,) * 300, (5, 400, 3, 250, 129, 1), (64,)])
def test_blocks_are_those_of_a_look_at_every_pair(lengths: tuple[int, ...], window: int) -> None:
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths, 0, 0]).cumsum(0, dtype=torch.int32)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def seen(_b: Any, _h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        found = (sample[q] == sample[k]) & (q >= k)
        return found & (q - k < window) if window else found

    at = torch.arange(tokens)
    pairs = seen(0, 0, at[:, None], at[None, :])
    found = sample_blocks(bounds, tokens, window)
    assert torch.equal(found.mask_mod(0, 0, at[:, None], at[None, :]), pairs)
    expected = create_block_mask(seen, None, None, tokens, tokens, device="cpu")
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    # Of those listed as full every pair is seen. torch does not list one that is cut off by the row's end.
    full = listed(found.full_kv_num_blocks, found.full_kv_indices)
    assert not (full & listed(found.kv_num_blocks, found.kv_indices)).any()
    assert not (listed(expected.full_kv_num_blocks, expected.full_kv_indices).tril(-1) & ~full).any()
    for query, key in full.nonzero().tolist():
        assert pairs[query * BLOCK :, key * BLOCK :][:BLOCK, :BLOCK].all()


def listed(counts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of one row and head: true where a block is listed."""
    found = torch.zeros(columns.shape[2:], dtype=torch.bool)
    for line, (count, order) in enumerate(zip(counts[0, 0].tolist(), columns[0, 0], strict=True)):
        found[line, order[:count].long()] = True
    return found


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize(
    "heads",
    [
        HEADS,
        HEADS._replace(window=4096),
        HEADS._replace(softcap=5.0, scaling=0.3),
        HEADS._replace(sinks=torch.float32, window=64),
        HEADS._replace(values_width=32),
        HEADS._replace(softcap=5.0, sinks=torch.float32, window=100),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_computes_what_the_reference_does(heads: trial.Heads, dtype: torch.dtype) -> None:
    assert trial.difference(FLEX, heads, CPU, dtype) is None


def test_flex_attention_is_not_compiled_for_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model makes of them is asked with the definition, and with what the kernel would be given."""
    monkeypatch.setattr(flex, "_attention", lambda _: pytest.fail("it was called"))
    bounds = torch.tensor([0, 9, 23], dtype=torch.int32)
    q, k, v = (torch.randn(23, heads, 16) for heads in (4, 2, 2))
    asked = trial.remembering(FLEX, {}).attend
    samples = Samples(bounds, 14, {5: sample_blocks(bounds, 23, 5)})
    assert torch.equal(asked(q, k, v, samples, Scores(window=5)), one_by_one(q, k, v, samples, Scores(window=5)))
    with pytest.raises(attention.Unsupported, match="a window of 6 tokens, which is not the model's"):
        asked(q, k, v, samples, Scores(window=6))


@pytest.mark.usefixtures("differentiable")
def test_outside_compiled_blocks_lengths_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit the compiler would go back to all pairs of tokens, in silence."""
    compile_by(monkeypatch)
    monkeypatch.setattr(flex, "_compiled", cache(flex._compiled.__wrapped__))
    monkeypatch.setattr(flex, "_attention", lambda _: flex._as_kernel)
    torch._dynamo.utils.counters.clear()
    for length in (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280):
        for window in (0, 50):
            bounds = torch.tensor([0, length - 30, length], dtype=torch.int32)
            samples = Samples(bounds, length, {window: sample_blocks(bounds, length, window)})
            scores = Scores(0.25, window, 5.0)
            q, k, v = (torch.randn(length, heads, 16, requires_grad=heads == 2) for heads in (4, 2, 2))
            expected = one_by_one(q, k, v, samples, scores)
            torch.testing.assert_close(flex.attend(q, k, v, samples, scores), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_with_flex_attention_train_the_same(
    model_folder: ModelFolder, tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are captured as ever, and run as they are: on a CPU the compiler has no backward pass for it."""
    compile_by(monkeypatch, "aot_eager_decomp_partition")
    monkeypatch.setattr(choice, "FLEX", replace(FLEX, why_not=lambda *_: None))
    changes: dict[str, Any] = {"architecture": "gemma2", "sliding_window": 6}
    slow = trained(model_folder(**changes), tmp_path / "slow")
    torch._dynamo.utils.counters.clear()
    training = {"flash_attn": "flex", "torch_compile": "always", "gradient_checkpointing": checkpointing}
    fast = trained(model_folder(**changes), tmp_path / "fast", training=training)
    assert_same(fast, slow)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 12  # four of them are the trial's
    assert not counters["unimplemented"]


def test_a_job_that_insists_on_flex_attention_is_told_why_not(model_folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"flashAttn: flex cannot be used: .*FlexAttention runs on GPUs; use auto"):
        trained(model_folder(), tmp_path, training={"flash_attn": "flex"})
