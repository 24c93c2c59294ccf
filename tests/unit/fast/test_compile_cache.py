"""Compiled code in the object store: found again, trusted only when it is sealed, and never a reason to fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from botocore.exceptions import CredentialRetrievalError
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.compiler._cache import CacheArtifactManager

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.fast import compile_cache
from finetune_trainer.fast.compile_cache import AFTER_STEPS, CompileCache, uri_of
from finetune_trainer.storage import ObjectStore
from tests.memory_store import BUCKET, MemoryClient, failure, memory_store
from tests.trainer_jobs import trainer_config

CPU = torch.device("cpu")

# torch 2.13 says so of itself, once it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture
def config(tmp_path: Path) -> TrainerConfig:
    return job(tmp_path)


def job(folder: Path, **changes: Any) -> TrainerConfig:
    return trainer_config(folder, folder, output={"uri": f"s3://{BUCKET}/out"}, **changes)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ObjectStore, MemoryClient]]:
    """An empty bucket, and credentials that last."""
    store, client = memory_store()
    use_credentials(store, monkeypatch)
    yield store, client


def use_credentials(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, key: str = "long kept", token: str | None = None
) -> None:
    found = SimpleNamespace(get_frozen_credentials=lambda: SimpleNamespace(secret_key=key, token=token))
    monkeypatch.setattr(store, "_session", SimpleNamespace(get_credentials=lambda: found))


@contextmanager
def a_node() -> Iterator[None]:
    """A process on a machine that has compiled nothing yet."""
    with fresh_cache(), CacheArtifactManager.with_fresh_cache(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompileCache, "_taken", False)
        yield


def callback(config: TrainerConfig, store: ObjectStore, *, main: bool = True) -> Any:
    context: Any = SimpleNamespace(store=store, world_size=1, local_rank=0, is_main=main)
    return CompileCache(config, context, CPU)


def steps(cache: Any, first: int, last: int) -> None:
    """The steps of an attempt that continues after `first`."""
    state = SimpleNamespace(global_step=first, max_steps=last)
    cache.on_train_begin(None, state, None)
    for state.global_step in range(first + 1, last + 1):
        cache.on_step_end(None, state, None)


def begin(cache: Any) -> None:
    """The start of an attempt."""
    cache.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=9), None)


def attempt(config: TrainerConfig, store: ObjectStore) -> None:
    """A whole one, of one step, on a machine of its own."""
    with a_node():
        compile_something()
        steps(callback(config, store), 0, 1)


def compile_something(scale: float = 2.0) -> dict[str, int]:
    """A product and its gradient, which need no compiler of the machine's. What torch counted."""
    torch._dynamo.reset()
    counters.clear()
    weight = torch.ones(8, 8, requires_grad=True)
    product = torch.compile(lambda x: x @ weight if scale == 2.0 else weight @ x @ weight)
    product(torch.ones(8, 8)).sum().backward()
    return dict(counters["aot_autograd"])


def test_what_one_attempt_compiled_the_next_one_finds(
    config: TrainerConfig, kept: tuple[ObjectStore, MemoryClient], caplog: pytest.LogCaptureFixture
) -> None:
    store, client = kept
    caplog.set_level(logging.INFO)
    with a_node():
        cache = callback(config, store)
        state = SimpleNamespace(global_step=7, max_steps=100)
        cache.on_train_begin(None, state, None)
        assert compile_something()["autograd_cache_miss"] == 1
        for state.global_step in range(8, 7 + AFTER_STEPS):
            cache.on_step_end(None, state, None)
        assert not client.objects, "it may still compile something"
        state.global_step = 7 + AFTER_STEPS
        cache.on_step_end(None, state, None)
    assert list(client.objects) == [uri_of(config, CPU).key]
    assert "nothing at s3://" in caplog.text and "MiB kept at s3://" in caplog.text
    with a_node():
        assert compile_something()["autograd_cache_miss"] == 1, "another node knows nothing of it"
    written = dict(client.objects)
    with a_node():
        cache = callback(config, store)
        cache.on_train_begin(None, state, None)
        found = compile_something()
        assert found["autograd_cache_hit"] == 1 and "autograd_cache_miss" not in found
        state.global_step += AFTER_STEPS
        client.before = lambda operation, key: pytest.fail(f"{operation}: there is nothing new to write")
        cache.on_step_end(None, state, None)
    assert client.objects == written


def test_a_short_run_keeps_it_at_its_last_step(config: TrainerConfig, kept: tuple[ObjectStore, MemoryClient]) -> None:
    store, client = kept
    with a_node():
        compile_something()
        steps(callback(config, store, main=False), 0, 3)
        assert not client.objects, "one process writes for all"
        steps(callback(config, store), 0, 3)
    assert client.objects


@pytest.mark.parametrize("change", ["key", "content", "seal", "short"])
def test_only_what_the_same_credentials_sealed_is_looked_into(
    config: TrainerConfig,
    kept: tuple[ObjectStore, MemoryClient],
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, client = kept
    key = uri_of(config, CPU).key
    attempt(config, store)
    data = client.objects[key]
    client.objects[key] = {
        "key": data,
        "content": data[:-1] + bytes([data[-1] ^ 1]),
        "seal": bytes(32) + data[32:],
        "short": data[:10],
    }[change]
    if change == "key":
        use_credentials(store, monkeypatch, "another's")
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda content: pytest.fail("it was looked into"))
    begin(callback(config, store))
    assert "was not written with these credentials" in caplog.text


def test_temporary_credentials_seal_nothing(
    config: TrainerConfig,
    kept: tuple[ObjectStore, MemoryClient],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, client = kept
    use_credentials(store, monkeypatch, token="of an hour")
    attempt(config, store)
    assert not client.objects
    assert "not used: it is sealed with credentials, and these are temporary" in caplog.text


@pytest.mark.parametrize("operation", ["GetObject", "PutObject"])
def test_a_store_that_refuses_is_a_warning(
    config: TrainerConfig,
    kept: tuple[ObjectStore, MemoryClient],
    operation: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, client = kept

    def refuse(asked: str, key: str) -> None:
        if asked == operation:
            raise failure(asked, "AccessDenied", 403)

    client.before = refuse
    attempt(config, store)
    assert f"cannot be {'read' if operation == 'GetObject' else 'written'}" in caplog.text


def test_a_seal_over_something_else_is_a_warning(
    config: TrainerConfig, kept: tuple[ObjectStore, MemoryClient], caplog: pytest.LogCaptureFixture
) -> None:
    """A torch of another format, for one."""
    store, client = kept
    seal = store.seal(b"something else")
    assert seal is not None
    client.objects[uri_of(config, CPU).key] = seal + b"something else"
    begin(callback(config, store))
    assert "is not what this torch wrote" in caplog.text


def test_what_cannot_be_unpacked_is_a_warning(
    config: TrainerConfig,
    kept: tuple[ObjectStore, MemoryClient],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, _ = kept
    attempt(config, store)

    def full(content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", full)
    begin(callback(config, store))
    assert "cannot be unpacked, so everything is compiled" in caplog.text


def test_credentials_that_cannot_be_had_are_a_warning(
    config: TrainerConfig,
    kept: tuple[ObjectStore, MemoryClient],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, client = kept

    def fail() -> None:
        raise CredentialRetrievalError(provider="a file", error_msg="it is gone")

    monkeypatch.setattr(store, "_session", SimpleNamespace(get_credentials=fail))
    attempt(config, store)
    assert not client.objects
    assert "the credentials cannot be had" in caplog.text


def test_the_first_of_several_adapters_keeps_it(config: TrainerConfig, kept: tuple[ObjectStore, MemoryClient]) -> None:
    """Of what torch gives out a second time it would read the last part only."""
    store, client = kept
    with a_node():
        compile_something()
        steps(callback(config, store), 0, 1)
        first = dict(client.objects)
        compile_something(3.0)
        steps(callback(config, store), 0, 1)
    assert client.objects == first


def test_too_much_is_not_kept(
    config: TrainerConfig,
    kept: tuple[ObjectStore, MemoryClient],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, client = kept
    monkeypatch.setattr(compile_cache, "LIMIT_BYTES", 1000)
    attempt(config, store)
    assert not client.objects and "are too many" in caplog.text


def test_runs_of_the_same_shape_share_it(tmp_path: Path) -> None:
    """Whatever they learn from, and how fast; another shape has a file of its own."""
    plain = uri_of(job(tmp_path), CPU)
    assert str(plain).startswith(f"s3://{BUCKET}/out/compile-cache/")
    for training in ({"learning_rate": 0.5}, {"seed": 3}, {"logging_steps": 7}):
        assert uri_of(job(tmp_path, training=training), CPU) == plain
    for changes in (
        {"training": {"micro_batch_size": 4}},
        {"training": {"precision": "bf16"}},
        {"lora": {"rank": 3}},
        {"dataset": {"max_length": 17}},
    ):
        assert uri_of(job(tmp_path, **changes), CPU) != plain


def test_code_that_calls_other_operators_is_not_shared(config: TrainerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = uri_of(config, CPU)
    monkeypatch.setattr(compile_cache, "own_code", lambda: "another version's")
    assert uri_of(config, CPU) != before


def test_own_code_is_that_of_all_operators() -> None:
    """Each of them changes it."""
    package = Path(compile_cache.__file__).parents[1]
    operators = {path for path in package.rglob("*.py") if "torch.library.custom_op" in path.read_text()}
    assert len(operators) >= 6
    assert operators <= set(compile_cache.operator_files())
