"""What the event loops say of errors that nobody awaits."""

from __future__ import annotations

import asyncio
import logging

import pytest

from finetune_operator.loops import new_event_loop


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed"), "DEBUG"),
        (RuntimeError("the store is broken"), "ERROR"),
        (OSError("the handler is closed"), "ERROR"),
    ],
)
def test_only_a_closed_connection_is_no_error(error: Exception, level: str, caplog: pytest.LogCaptureFixture) -> None:
    async def tell() -> None:
        asyncio.get_running_loop().call_exception_handler(
            {"message": "Fatal error on SSL protocol", "exception": error}
        )

    with caplog.at_level(logging.DEBUG), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(tell())
    assert [one.levelname for one in caplog.records if one.name in ("asyncio", "finetune_operator.loops")] == [level]
