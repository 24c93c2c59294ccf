"""Who may see which jobs.

In a cluster: whoever may list FineTuneJobs in a namespace sees those of that namespace. The caller is known by a token
(TokenReview), or by what an authenticating proxy says that proves itself with a shared secret. On one's own machine:
whoever knows the random token in the address that `finetune dashboard` prints, since other users of the machine reach
its loopback too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from multidict import CIMultiDictProxy

from finetune_operator.claims import MAX_TOKEN_LENGTH
from finetune_operator.dashboard.recent import Recent
from finetune_operator.errors import FinetuneError, ReviewFailed
from finetune_operator.users import Reviews, User

Headers = CIMultiDictProxy[str]

TOKEN_HEADER = "X-Finetune-Token"  # nosec B105  # name of a header
"""Where a token stands that comes through `kubectl proxy`: the API server keeps `Authorization` to itself."""
SECRET_HEADER = "X-Finetune-Proxy-Secret"  # nosec B105  # name of a header
REVIEW_SECONDS = 60.0
"""How long an answer of the API server holds: so long a right that was taken away is still honoured."""
DENIED_SECONDS = 10.0
"""How long a refusal holds: whoever was granted a right does not wait for it long."""
_KEPT = 10_000
_PARALLEL = 8
_WAITING = 64
_LONGEST_NAME = 1024
_LONGEST_NAMESPACE = 63


class Unauthenticated(FinetuneError):
    """Nobody knows who is asking."""


class Visible(Protocol):
    """Whose jobs somebody sees."""

    @property
    def name(self) -> str:
        """Who it is."""

    async def namespaces(self, there: Iterable[str]) -> frozenset[str]:
        """Those of some namespaces that are seen. Raises ReviewFailed."""


class Access(Protocol):
    """Finds out who is asking."""

    async def viewer(self, headers: Headers) -> Visible:
        """Who it is. Raises Unauthenticated, ReviewFailed."""


@dataclass(frozen=True, slots=True)
class Everything:
    """Sees all there is: it is their own."""

    name: str

    async def namespaces(self, there: Iterable[str]) -> frozenset[str]:
        """All of them."""
        return frozenset(there)


class OwnMachine:
    """Knows one random token."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(24)

    async def viewer(self, headers: Headers) -> Visible:
        """The one user there is."""
        if not _equal(_token(headers), self.token):
            raise Unauthenticated("open the address that `finetune dashboard` printed: it holds the token")
        return Everything("you")


@dataclass(frozen=True, slots=True)
class TrustedProxy:
    """An ingress that signs users in, and says who they are in headers."""

    secret: Callable[[], str]
    """What it shows in `X-Finetune-Proxy-Secret`; empty: nobody is believed."""
    user_header: str
    groups_header: str

    def user(self, headers: Headers) -> User | None:
        """Whom it names; None where no proxy says that it is one. Raises Unauthenticated."""
        shown = headers.getall(SECRET_HEADER, [])
        if not shown:
            return None
        expected = self.secret()
        if len(shown) != 1 or not expected or not _equal(shown[0], expected):
            raise Unauthenticated(f"{SECRET_HEADER} is not the secret that the operator was given")
        named = headers.getall(self.user_header, [])
        if len(named) != 1 or not named[0].strip() or len(named[0]) > _LONGEST_NAME:
            raise Unauthenticated(f"the proxy names no user in {self.user_header}")
        groups = [one.strip() for line in headers.getall(self.groups_header, []) for one in line.split(",")]
        # Kubernetes' own: an identity provider whose users may choose names of groups must not make administrators.
        names = [named[0].strip(), *filter(None, groups)]
        if any(name.startswith("system:") or not name.isprintable() for name in names):
            raise Unauthenticated("the proxy names a user or group that it may not: Kubernetes' own, or no text")
        return User(names[0], (*names[1:], "system:authenticated"))


class ClusterAccess:
    """Asks the API server, and remembers its answers for a minute."""

    def __init__(self, reviews: Reviews, proxy: TrustedProxy | None = None) -> None:
        self._reviews = reviews
        self._proxy = proxy
        # By digest: no token is kept for longer than its request.
        self._users: Recent[str, User | None] = Recent(seconds=REVIEW_SECONDS, most=_KEPT)
        self._rights: Recent[tuple[User, str | None], bool] = Recent(seconds=REVIEW_SECONDS, most=_KEPT)
        self._asking = asyncio.Semaphore(_PARALLEL)
        self._waiting = 0

    async def viewer(self, headers: Headers) -> Visible:
        """Who shows a token, or whom the proxy names."""
        user = self._proxy.user(headers) if self._proxy is not None else None
        if user is None:
            user = await self._whose(_token(headers))
        return _Caller(user.name, user, self)

    async def _whose(self, token: str) -> User:
        if not token or len(token) > MAX_TOKEN_LENGTH:
            raise Unauthenticated(
                "show a token of somebody who may list FineTuneJobs, such as `kubectl create token NAME` gives"
            )
        digest = hashlib.sha256(_bytes(token)).hexdigest()
        known = self._users.get(digest)
        user = known[0] if known else self._users.put(digest, await self._reviewed_token(token))
        if user is None:
            raise Unauthenticated("the API server does not know this token, or it has expired")
        return user

    async def _reviewed_token(self, token: str) -> User | None:
        # Strangers may ask as well: who cannot be served soon is told to come back, and nobody waits behind them.
        if self._waiting >= _WAITING:
            raise ReviewFailed("too many callers wait to be identified")
        self._waiting += 1
        try:
            async with self._asking:
                return await self._reviews.whose(token)
        finally:
            self._waiting -= 1

    async def may(self, user: User, namespace: str | None) -> bool:
        """Whether a user may list jobs there; None means everywhere."""
        known = self._rights.get((user, namespace))
        if known is not None:
            return known[0]
        async with self._asking:
            allowed = await self._reviews.may_list_jobs(user, namespace)
        return self._rights.put((user, namespace), allowed, REVIEW_SECONDS if allowed else DENIED_SECONDS)


@dataclass(frozen=True, slots=True)
class _Caller:
    """Somebody whom the cluster knows."""

    name: str
    _user: User
    _access: ClusterAccess

    async def namespaces(self, there: Iterable[str]) -> frozenset[str]:
        """All where they may list everywhere, otherwise those where they may."""
        # A longer name is no namespace's: it comes out of an address, and answers are remembered by it.
        names = sorted(name for name in set(there) if len(name) <= _LONGEST_NAMESPACE)
        if await self._access.may(self._user, None):
            return frozenset(names)
        answers = await asyncio.gather(*(self._access.may(self._user, name) for name in names))
        return frozenset(name for name, may in zip(names, answers, strict=True) if may)


def _bytes(text: str) -> bytes:
    """What a header was: bytes that are no UTF-8 come as halves of surrogate pairs."""
    return text.encode(errors="surrogateescape")


def _equal(shown: str, expected: str) -> bool:
    """In a time that does not tell how much was right."""
    return hmac.compare_digest(_bytes(shown), _bytes(expected))


def _token(headers: Headers) -> str:
    """The token that a caller shows; empty where it shows none."""
    own = headers.get(TOKEN_HEADER)
    if own is not None:
        return own.strip()
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
