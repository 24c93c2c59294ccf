"""FlashAttention 4 as an operator of torch. The package runs on GPUs: here its functions are stood in for by the
definition, so that what is tested is what they are asked for, and what becomes of their results."""

from __future__ import annotations

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.fast.attention import Unsupported, choice, flash4, trial
from finetune_trainer.fast.attention.flash4 import FLASH4
from finetune_trainer.fast.attention.kernel import Samples, Scores
from finetune_trainer.fast.attention.reference import one_by_one
from tests.tiny_models import tiny_model
from tests.unit.fast.test_attention_kernels import best

CPU = torch.device("cpu")
HEADS = trial.Heads(4, 2, 16, 16, None, 0, None, sinks=None)
CAPPED = HEADS._replace(softcap=5.0, scaling=0.3)
WITH_SINKS = HEADS._replace(sinks=torch.float32, window=64)


class Package:
    """The functions of `flash_attn.cute.interface`, with the names of their arguments."""

    def __init__(self, results: int) -> None:
        self.results = results
        """Of the forward function: two until 4.0.0b19, five since."""

    def _flash_attn_fwd(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool, **options: Any
    ) -> tuple[Any, ...]:
        assert return_lse
        found = defined(q, k, v, **options).contiguous()
        sums = torch.full((q.shape[1], q.shape[0]), 0.5)
        return (found, sums, None, None, None)[: self.results]

    def _flash_attn_bwd(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        dout: torch.Tensor,
        lse: torch.Tensor,
        *,
        deterministic: bool,
        learnable_sink: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        assert lse.unique().tolist() == [0.5]
        assert deterministic == torch.are_deterministic_algorithms_enabled()

        def slopes() -> tuple[torch.Tensor, ...]:
            leaves = [one.detach().clone().requires_grad_() for one in (q, k, v)]
            sinks = [] if learnable_sink is None else [learnable_sink.detach().clone().requires_grad_()]
            found = defined(*leaves, learnable_sink=sinks[0] if sinks else None, **options)
            torch.testing.assert_close(found.detach(), out)
            return torch.autograd.grad(found, [*leaves, *sinks], dout)

        # Within an operator a thread records nothing for gradients.
        with ThreadPoolExecutor(1) as another:
            return another.submit(slopes).result()


def defined(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    softcap: float,
    causal: bool,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """What these arguments mean in the package: a token sees as many to its left, and itself."""
    assert cu_seqlens_q is cu_seqlens_k
    assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
    assert causal == (window_size_left is None)
    assert window_size_right == (None if causal else 0)
    window = 0 if window_size_left is None else window_size_left + 1
    scores = Scores(softmax_scale, window, softcap or None, learnable_sink)
    return one_by_one(q, k, v, Samples(cu_seqlens_q, max_seqlen_q), scores)


@pytest.fixture(params=[2, 5], ids=["two results", "five results"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two generations."""
    stand_in = Package(request.param)
    monkeypatch.setattr(flash4, "_package", lambda: stand_in)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    "heads",
    [HEADS, HEADS._replace(window=4096), CAPPED, WITH_SINKS, HEADS._replace(values_width=32, scaling=0.2)],
    ids=str,
)
def test_the_package_is_asked_for_what_the_reference_computes(heads: trial.Heads) -> None:
    assert trial.difference(FLASH4, heads, CPU, torch.float32) is None


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(0, 0.0, False), (5, 0.0, True), (0, 3.0, False)], ids=["plain", "sinks", "capped"]
)
def test_torch_knows_shapes_and_gradients_of_the_operator(window: int, softcap: float, sinks: bool) -> None:
    bounds = torch.tensor([0, 7, 20, 20], dtype=torch.int32)
    # As a model has them: heads before tokens, turned.
    q, k, v = (torch.randn(heads, 20, 8).transpose(0, 1).requires_grad_() for heads in (4, 2, 2))
    sink = torch.randn(4, requires_grad=True) if sinks else None
    torch.library.opcheck(flash4._flash4, (q, k, v, bounds, sink, 13, 0.3, window, softcap))


@pytest.mark.usefixtures("package")
def test_who_wants_the_same_bits_each_time_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert trial.difference(FLASH4, HEADS, CPU, torch.float32) is None


@pytest.mark.usefixtures("package")
def test_it_is_one_operator_in_a_compiled_graph() -> None:
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    samples, scores = Samples(bounds, 13), Scores(None, 5, 3.0, torch.randn(4))
    # As a model has them: heads before tokens, turned.
    q, k, v = (torch.randn(heads, 20, 8).transpose(0, 1).requires_grad_() for heads in (4, 2, 2))
    compiled = torch.compile(FLASH4.attend, backend="aot_eager", fullgraph=True)
    slopes = []
    for function in (one_by_one, FLASH4.attend, compiled):
        found = function(q, k, v, samples, scores)
        slopes.append((found, *torch.autograd.grad(found.square().sum(), (q, k, v))))
    for other in slopes[1:]:
        torch.testing.assert_close(other, slopes[0])


def test_it_is_looked_for_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert FLASH4.why_not(CPU, torch.bfloat16) == "flash_attn.cute is not installed"
    # Version 2 has the same name.
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert FLASH4.why_not(CPU, torch.bfloat16) == "flash_attn.cute is not installed"
    (tmp_path / "flash_attn" / "cute").mkdir()
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("answer = 42\n")
    assert FLASH4.why_not(CPU, torch.bfloat16) == "it runs on GPUs"
    assert "flash_attn" not in sys.modules


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((8, 9), torch.bfloat16, "GPU X is older than compute capability 9.0"),
        ((9, 0), torch.float32, "it computes in 16 bits only"),
        ((9, 0), torch.bfloat16, None),
        ((10, 0), torch.float16, None),
    ],
)
def test_gpus_and_types_that_it_has_gradients_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, reason: str | None
) -> None:
    monkeypatch.setattr(flash4, "_is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU X")
    assert FLASH4.why_not(torch.device("cuda"), dtype) == reason


def test_what_the_package_raises_when_it_is_imported_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("raise ImportError('no CUDA driver')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flash4._package.cache_clear()
    monkeypatch.setattr(choice, "_candidates", lambda *_: (replace(FLASH4, why_not=lambda *_: None),))
    with pytest.raises(Unsupported, match=r"^FlashAttention 4: no CUDA driver$"):
        best(tiny_model("llama"))
    for name in [one for one in sys.modules if one.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]
