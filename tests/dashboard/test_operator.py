"""The dashboard as a part of the operator: its settings, its certificate, its Service."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetune_operator import serving
from finetune_operator.certificate_protocol import Request
from finetune_operator.certificates import make
from finetune_operator.errors import FinetuneError
from finetune_operator.kubernetes import endpoint
from finetune_operator.kubernetes.access_review import user_of
from finetune_operator.serving_tls import CertificateFiles, ServingTls
from finetune_operator.settings import Settings
from finetune_operator.users import User
from tests.dashboard.serving import ADMIN, World

ON = {"FINETUNE_DASHBOARD__PORT": "8444", "FINETUNE_DASHBOARD__SERVICE": "d"}


def test_it_is_off_unless_it_has_a_port() -> None:
    assert Settings.from_env({}).dashboard.port is None
    read = Settings.from_env({**ON, "FINETUNE_ADDRESS": "10.0.0.1"}).dashboard
    assert (read.port, read.service, read.user_header) == (8444, "d", "X-Forwarded-User")


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (ON, "FINETUNE_ADDRESS"),
        ({"FINETUNE_DASHBOARD__SERVICE": "d", "FINETUNE_ADDRESS": "10.0.0.1"}, "FINETUNE_DASHBOARD__PORT"),
        ({"FINETUNE_DASHBOARD__PORT": "70000"}, "FINETUNE_DASHBOARD__PORT"),
        ({"FINETUNE_DASHBOARD__USER_HEADER": "X User"}, "FINETUNE_DASHBOARD__USER_HEADER"),
    ],
)
def test_settings_that_do_not_fit(environment: dict[str, str], named: str) -> None:
    with pytest.raises(FinetuneError, match=named):
        Settings.from_env(environment)


async def test_it_has_the_progress_servers_certificate(tmp_path: Path) -> None:
    made = make(Request(now=time.time(), hosts=("localhost",))).bundle
    for name, text in (("tls.crt", made.certificate), ("tls.key", made.key), ("ca.crt", made.ca)):
        (tmp_path / name).write_text(text)
    tls = ServingTls(CertificateFiles(*(tmp_path / name for name in ("tls.crt", "tls.key", "ca.crt"))))
    world = World()
    progress = await serving.listen(web.Application(), "127.0.0.1", 0, tls, setting="PORT")
    app = world.dashboard.application()
    pages = await serving.listen(app, "127.0.0.1", 0, tls, setting="PORT", refresh=False)
    try:
        assert len(app.cleanup_ctx) == 0, "the progress server keeps the certificate fresh for both"
        trusting = aiohttp.TCPConnector(ssl=ssl.create_default_context(cadata=made.ca), family=2)
        async with aiohttp.ClientSession(connector=trusting) as session:
            url = f"https://localhost:{pages.addresses[0][1]}/api/about"
            async with session.get(url, headers={"Authorization": f"Bearer {ADMIN}"}) as answer:
                assert (answer.status, (await answer.json())["user"]) == (200, "alice")
    finally:
        await pages.cleanup()
        await progress.cleanup()


async def test_both_services_are_led_to_the_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    led: list[Any] = []

    async def keep(self: endpoint.LeaderEndpoint, seconds: float) -> None:
        led.append(self._endpoint)
        await asyncio.Event().wait()

    monkeypatch.setattr(endpoint.LeaderEndpoint, "keep", keep)
    variables = {**ON, "FINETUNE_ADDRESS": "10.0.0.1", "FINETUNE_PROGRESS_SERVICE": "p", "FINETUNE_NAMESPACE": "n"}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(endpoint.lead_services(None, Settings.from_env(variables)), 0.1)  # type: ignore[arg-type]
    assert {(one.service, one.port, one.port_name) for one in led} == {
        ("p", 8443, "progress"),
        ("d", 8444, "dashboard"),
    }
    slices = {one.service: one.manifest("uid") for one in led}
    assert slices["d"]["ports"] == [{"name": "dashboard", "port": 8444, "protocol": "TCP"}]
    assert slices["d"]["endpoints"][0]["addresses"] == ["10.0.0.1"]


INFOS: list[tuple[dict[str, Any], User | None]] = [
    ({}, None),
    ({"username": ""}, None),
    ({"username": 3}, None),
    ({"username": "a"}, User("a")),
    (
        {"username": "a", "groups": ["g"], "uid": "u", "extra": {"z": ["1"], "b": None}},
        User("a", ("g",), "u", (("b", ()), ("z", ("1",)))),
    ),
]


@pytest.mark.parametrize(("info", "user"), INFOS, ids=range(len(INFOS)))
def test_who_the_api_server_names(info: dict[str, Any], user: User | None) -> None:
    assert user_of(info) == user
