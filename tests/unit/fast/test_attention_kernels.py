"""Which kernel computes attention over samples, and what FlexAttention is told of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl, flex_attention
from torch.nn.attention.flex_attention import create_block_mask

from finetune_trainer.contract.vocabulary import FlashAttn
from finetune_trainer.fast import attention
from finetune_trainer.fast.attention import choice, trial, varlen
from finetune_trainer.fast.attention.flex import BLOCK, FLEX, sample_blocks
from finetune_trainer.fast.attention.kernel import Kernel, Samples, Scores
from finetune_trainer.fast.attention.reference import ONE_BY_ONE, one_by_one
from tests.tiny_models import tiny_model
from tests.unit.fast.test_training import assert_same, trained
from tests.unit.trainer_core.conftest import ModelFolder

CPU = torch.device("cpu")
HEADS = trial.Heads(4, 2, 16, 16, None, 0, None, sinks=False)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not let FlexAttention be differentiated on a CPU; its definition by all pairs can be."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


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
        HEADS._replace(sinks=True, window=64),
        HEADS._replace(values_width=32),
        HEADS._replace(softcap=5.0, sinks=True, window=100),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_attention_computes_what_the_reference_does(heads: trial.Heads, dtype: torch.dtype) -> None:
    assert trial.difference(FLEX, heads, CPU, dtype) is None


def wrong_window(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """One token more is seen."""
    return one_by_one(q, k, v, samples, scores._replace(window=scores.window + 1 if scores.window else 0))


def wrong_gradient(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """Keys get none."""
    right = one_by_one(q, k, v, samples, scores)
    return one_by_one(q, k * 1.0 + (k.detach() - k) * 0.5, v, samples, scores) if right.requires_grad else right


def no_cap(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """Scores as they are."""
    return one_by_one(q, k, v, samples, scores._replace(softcap=None))


def not_a_number(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """NaN throughout."""
    return one_by_one(q, k, v, samples, scores) * float("nan")


@pytest.mark.parametrize(
    ("attend", "heads", "said"),
    [
        (wrong_window, HEADS._replace(window=64), "output differs by"),
        (wrong_gradient, HEADS, "gradients of keys differ by"),
        (no_cap, HEADS._replace(softcap=1.0), "output differs by"),
        (not_a_number, HEADS, "output differs by nan"),
    ],
)
def test_a_kernel_that_computes_something_else_is_found_out(
    attend: Callable[..., torch.Tensor], heads: trial.Heads, said: str
) -> None:
    found = trial.difference(replace(ONE_BY_ONE, attend=attend), heads, CPU, torch.float32)
    assert found is not None
    assert found.startswith(said)


def failing(*_: Any) -> torch.Tensor:
    """As a package does that does not fit."""
    raise AttributeError("module has no such function\nand more")


def candidates(*found: Kernel) -> Callable[..., Any]:
    return lambda *_: iter(found)


def best(model: Any, wanted: FlashAttn = FlashAttn.VARLEN) -> Kernel:
    def run(inputs: dict[str, Any]) -> torch.Tensor:
        found: torch.Tensor = model.base_model(**inputs).last_hidden_state
        return found

    with torch.no_grad():
        return attention.best_kernel(model.eval(), CPU, torch.float32, wanted, run, 32)


def test_the_next_kernel_is_taken_where_one_fails_or_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = replace(ONE_BY_ONE, name="broken", attend=failing)
    wrong = replace(ONE_BY_ONE, name="wrong", attend=wrong_gradient)
    elsewhere = replace(ONE_BY_ONE, name="elsewhere", why_not=lambda *_: "not on this machine")
    model = tiny_model("mistral", sliding_window=20)
    monkeypatch.setattr(choice, "_candidates", candidates(broken, elsewhere, wrong, ONE_BY_ONE))
    with caplog.at_level(logging.INFO):
        assert best(model) is ONE_BY_ONE
    assert model.config._attn_implementation == "sdpa"
    assert [line.split(" by ")[0] for line in caplog.messages if line.startswith("attention: not with")] == [
        "attention: not with broken: module has no such function",
        "attention: not with elsewhere: not on this machine",
        "attention: not with wrong: gradients of keys differ",
    ]
    monkeypatch.setattr(choice, "_candidates", candidates(broken, elsewhere))
    with pytest.raises(attention.Unsupported, match=r"^broken: module has no .*; elsewhere: not on this machine$"):
        best(model)


@pytest.mark.usefixtures("differentiable")
def test_a_model_with_soft_capped_scores_gets_the_kernel_that_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that a GPU has no other for; here on a CPU."""
    other = replace(varlen.TORCHS, why_not=lambda *_: None)
    flex = replace(FLEX, why_not=lambda *_: None)
    monkeypatch.setattr(choice, "_candidates", candidates(other, flex))
    assert best(tiny_model("gemma2", sliding_window=20)) is flex


def test_kernels_come_in_the_order_of_their_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")

    def names(wanted: FlashAttn, device: torch.device) -> list[str]:
        return [kernel.name.split(" of torch")[0] for kernel in choice._candidates(wanted, device)]

    assert names(FlashAttn.AUTO, gpu) == ["varlen_attn", "FlexAttention"]
    assert names(FlashAttn.FLEX, gpu) == ["FlexAttention"]
    assert names(FlashAttn.VARLEN, CPU) == ["one by one, on a CPU"]
    monkeypatch.syspath_prepend(str(installed_package(tmp_path)))
    (tmp_path / "flash_attn_interface.py").touch()
    expected = ["FlashAttention 3", "FlashAttention 4", "varlen_attn", "FlexAttention"]
    assert names(FlashAttn.VARLEN, gpu) == expected


def installed_package(folder: Path) -> Path:
    """The modules by which torch finds FlashAttention 4."""
    (folder / "flash_attn" / "cute").mkdir(parents=True)
    (folder / "flash_attn" / "__init__.py").touch()
    (folder / "flash_attn" / "cute" / "__init__.py").touch()
    (folder / "flash_attn" / "cute" / "interface.py").write_text("_flash_attn_fwd = _flash_attn_bwd = print\n")
    return folder


def test_an_installed_package_takes_the_place_of_torchs_kernel_for_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed_package(tmp_path)))
    (kernel,) = varlen.installed_packages()
    assert kernel.name == "FlashAttention 4"
    assert kernel.why_not(CPU, torch.bfloat16) == "it runs on GPUs"
    model = tiny_model("llama")
    assert current_flash_attention_impl() is None
    with attention.installed(model, kernel):
        assert current_flash_attention_impl() == "FA4"
    assert current_flash_attention_impl() is None
    # One that is there and cannot be imported is no kernel, and leaves nothing behind.
    missing = Kernel("missing", kernel.attend, lambda *_: None, active=lambda: varlen._in_place_of_torchs("FA3"))
    monkeypatch.setattr(choice, "_candidates", candidates(missing))
    with pytest.raises(attention.Unsupported, match=r"^missing: No module named 'flash_attn_interface'$"):
        best(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_with_flex_attention_train_the_same(
    model_folder: ModelFolder, tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are captured as ever, and run as they are: on a CPU the compiler has no backward pass for it."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: compile_(function, **{"backend": "aot_eager_decomp_partition", **options}),
    )
    monkeypatch.setattr(choice, "FLEX", replace(FLEX, why_not=lambda *_: None))
    torch._dynamo.reset()
    changes: dict[str, Any] = {"architecture": "gemma2", "sliding_window": 6}
    slow = trained(model_folder(**changes), tmp_path / "slow")
    torch._dynamo.utils.counters.clear()
    training = {"flash_attn": "flex", "torch_compile": "always", "gradient_checkpointing": checkpointing}
    fast = trained(model_folder(**changes), tmp_path / "fast", training=training)
    assert_same(fast, slow)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 8
    assert not counters["unimplemented"]


def test_a_job_that_insists_on_flex_attention_is_told_why_not(model_folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"flashAttn: flex cannot be used: .*FlexAttention runs on GPUs; use auto"):
        trained(model_folder(), tmp_path, training={"flash_attn": "flex"})
