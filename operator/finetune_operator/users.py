"""Who asks to see jobs, and how that is found out. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class User:
    """A user as the API server knows it (authentication.k8s.io/v1 UserInfo)."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()


class Reviews(Protocol):
    """What an API server says of users. Both raise ReviewFailed where it does not answer."""

    async def whose(self, token: str) -> User | None:
        """The user that a token is of; None when it is not valid."""

    async def may_list_jobs(self, user: User, namespace: str | None) -> bool:
        """Whether a user may list FineTuneJobs in a namespace; None means in all of them."""
