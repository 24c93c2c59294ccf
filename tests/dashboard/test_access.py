"""Who sees what: by token, by proxy, by namespace; and what strangers cost."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from finetune_operator.dashboard.access import (
    SECRET_HEADER,
    TOKEN_HEADER,
    ClusterAccess,
    OwnMachine,
    TrustedProxy,
    Unauthenticated,
)
from finetune_operator.errors import ReviewFailed
from finetune_operator.users import User
from tests.dashboard.serving import ADMIN, NOBODY, TEAM_A, Client, Reviews, World, served

ALL = {"team-a", "team-b", "research"}
SECRET = "a-secret-that-both-share"
PROTECTED = ("api/about", "api/form", "api/jobs", "api/jobs/team-a/medical-qa-8b")


def namespaces(client: Client, token: str | None) -> set[str]:
    return {one["namespace"] for one in client.ask("api/jobs", token).data["jobs"]}


@pytest.mark.parametrize(("token", "seen"), [(ADMIN, ALL), (TEAM_A, {"team-a"}), (NOBODY, set())])
def test_everybody_sees_the_namespaces_that_they_may_list(client: Client, token: str, seen: set[str]) -> None:
    assert namespaces(client, token) == seen
    for namespace, name in (("team-a", "medical-qa-8b"), ("team-b", "support-bot")):
        assert client.ask(f"api/jobs/{namespace}/{name}", token).status == (200 if namespace in seen else 404)


def test_what_may_not_be_seen_looks_like_what_is_not_there(client: Client) -> None:
    hidden = client.ask("api/jobs/team-b/support-bot", TEAM_A)
    absent = client.ask("api/jobs/team-b/nothing-here", TEAM_A)
    assert hidden.status == absent.status == 404
    assert hidden.data["problem"].replace("support-bot", "X") == absent.data["problem"].replace("nothing-here", "X")


@pytest.mark.parametrize("path", PROTECTED)
@pytest.mark.parametrize("token", [None, "", "wrong", "x" * 8000, "\xff\xfe"])
def test_strangers_see_nothing(client: Client, path: str, token: str | None) -> None:
    answer = client.ask(path, token)
    assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert set(answer.data) == {"problem"}


def test_strangers_check_nothing(client: Client) -> None:
    assert client.check("kind: FineTuneJob", token=None).status == 401


def test_a_token_comes_through_kubectl_proxy_in_a_header_of_its_own(client: Client) -> None:
    assert client.ask("api/about", None, **{TOKEN_HEADER: ADMIN}).data["user"] == "alice"


def test_an_answer_is_asked_for_once_a_minute(world: World, client: Client) -> None:
    for _ in range(5):
        client.ask("api/jobs", TEAM_A)
    assert sorted(world.reviews.asked) == ["bob None", "bob research", "bob team-a", "bob team-b", "token"]


def test_what_cannot_be_a_namespace_is_not_asked_for(world: World, client: Client) -> None:
    """Else the answers that are remembered would be as long as the addresses that somebody makes up."""
    for token in (TEAM_A, ADMIN):
        assert client.ask(f"api/jobs/{'n' * 64}/qa", token).status == 404
        assert client.ask(f"api/jobs/{'n' * 63}/qa", token).status == 404
    assert [one for one in world.reviews.asked if "nn" in one] == [f"bob {'n' * 63}"]


def test_an_api_server_that_does_not_answer(world: World, client: Client) -> None:
    world.reviews.down = True
    assert client.ask("api/jobs").status == 503
    world.reviews.down = False
    assert client.ask("api/jobs").status == 200, "a failure is not remembered"


PROXY_CASES: list[tuple[str, dict[str, str], int, str]] = [
    ("signed in", {"X-Forwarded-User": "carol", "X-Forwarded-Groups": "team-a,others"}, 200, "carol"),
    ("in no group", {"X-Forwarded-User": "carol"}, 200, "carol"),
    ("wrong secret", {SECRET_HEADER: "guess", "X-Forwarded-User": "carol"}, 401, ""),
    ("empty secret", {SECRET_HEADER: "", "X-Forwarded-User": "carol"}, 401, ""),
    ("no user", {"X-Forwarded-Groups": "team-a"}, 401, ""),
    ("blank user", {"X-Forwarded-User": " "}, 401, ""),
    ("too long a user", {"X-Forwarded-User": "x" * 2000}, 401, ""),
    ("a group of Kubernetes", {"X-Forwarded-User": "carol", "X-Forwarded-Groups": "a, system:masters"}, 401, ""),
    ("no text", {"X-Forwarded-User": "car\xffol"}, 401, ""),
    ("an account of Kubernetes", {"X-Forwarded-User": "system:serviceaccount:kube-system:root"}, 401, ""),
]


@pytest.mark.parametrize(("_", "headers", "status", "user"), PROXY_CASES, ids=[case[0] for case in PROXY_CASES])
def test_a_proxy_that_proves_itself(tmp_path: Path, _: str, headers: dict[str, str], status: int, user: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    world = World(proxy_secret=str(secret))
    world.fill()
    with served(world.dashboard.application) as client:
        answer = client.ask("api/about", None, **{SECRET_HEADER: SECRET, **headers})
        assert answer.status == status
        if status == 200:
            assert answer.data["user"] == user
            listed = client.ask("api/jobs", None, **{SECRET_HEADER: SECRET, **headers}).data["jobs"]
            groups = headers.get("X-Forwarded-Groups", "")
            assert {one["namespace"] for one in listed} == ({"team-a"} if "team-a" in groups else set())


def test_headers_of_users_mean_nothing_without_the_secret(client: Client, tmp_path: Path) -> None:
    named = {"X-Forwarded-User": "alice", "X-Forwarded-Groups": "platform"}
    assert client.ask("api/jobs", None, **named).status == 401
    assert client.ask("api/jobs", None, **{SECRET_HEADER: "", **named}).status == 401, "no proxy is configured"
    world = World(proxy_secret=str(tmp_path / "missing"))
    with served(world.dashboard.application) as other:
        assert other.ask("api/jobs", None, **named).status == 401
        assert other.ask("api/jobs", None, **{SECRET_HEADER: "x", **named}).status == 401, "its file is not there"
    (tmp_path / "missing").write_text("short")
    with served(world.dashboard.application) as other:
        assert other.ask("api/jobs", None, **{SECRET_HEADER: "short", **named}).status == 401, "anybody could guess it"


def headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


@pytest.mark.parametrize("twice", [SECRET_HEADER, "X-Forwarded-User"])
def test_a_header_that_comes_twice_is_believed_neither_time(twice: str) -> None:
    proxy = TrustedProxy(lambda: SECRET, "X-Forwarded-User", "X-Forwarded-Groups")
    said = [(SECRET_HEADER, SECRET), ("X-Forwarded-User", "carol")]
    assert proxy.user(headers(*said)) == User("carol", ("system:authenticated",))
    with pytest.raises(Unauthenticated):
        proxy.user(headers(*said, *[one for one in said if one[0] == twice]))


class Slow(Reviews):
    """Answers after a while."""

    most = 0
    now = 0

    async def whose(self, token: str) -> User | None:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1
        return await super().whose(token)


async def test_strangers_wait_in_a_short_line() -> None:
    reviews = Slow()
    access = ClusterAccess(reviews)
    began = time.monotonic()
    asked = [access.viewer(headers(("Authorization", f"Bearer stranger-{number}"))) for number in range(200)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused = [one for one in answers if isinstance(one, ReviewFailed)]
    unknown = [one for one in answers if isinstance(one, Unauthenticated)]
    assert len(refused) + len(unknown) == 200 and len(unknown) == 64
    assert reviews.most <= 8 and time.monotonic() - began < 5
    assert (await access.viewer(headers(("Authorization", f"Bearer {ADMIN}")))).name == "alice"


async def test_on_ones_own_machine_one_random_token_opens_all() -> None:
    access = OwnMachine()
    assert len(access.token) >= 32 and access.token != OwnMachine().token
    viewer = await access.viewer(headers(("Authorization", f"Bearer {access.token}")))
    assert await viewer.namespaces(["a", "b"]) == {"a", "b"}
    assert (await access.viewer(headers((TOKEN_HEADER, access.token)))).name == "you"
    for name, value in (("X", ""), ("Authorization", "Bearer x"), ("Authorization", access.token), (TOKEN_HEADER, "é")):
        with pytest.raises(Unauthenticated):
            await access.viewer(headers((name, value)))
