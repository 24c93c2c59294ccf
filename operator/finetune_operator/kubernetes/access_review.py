"""Who is it, and may they? Asked of the API server (TokenReview, SubjectAccessReview)."""

from __future__ import annotations

import logging
from typing import Any

import httpx2 as httpx
from lightkube import AsyncClient
from lightkube.generic_resource import create_global_resource

from finetune_operator import constants as c
from finetune_operator.errors import ReviewFailed
from finetune_operator.kubernetes.token_review import TokenReviews
from finetune_operator.users import User

SubjectAccessReviews = create_global_resource(
    "authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews"
)
log = logging.getLogger(__name__)


class AccessReviewer:
    """Implements `users.Reviews`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client: Any = client  # lightkube's overloads leave generic resources out

    async def whose(self, token: str) -> User | None:
        """The user that a token is of, by the API server's own audience: a token that was made for another service,
        such as one to report progress with, is nobody's here."""
        review = await self._create(TokenReviews, {"token": token})
        if review.get("authenticated") is not True or review.get("error"):
            return None
        return user_of(review.get("user") or {})

    async def may_list_jobs(self, user: User, namespace: str | None) -> bool:
        """Whether a user may list FineTuneJobs in a namespace; None means in all of them."""
        attributes = {"verb": "list", "group": c.GROUP, "resource": c.PLURAL, "namespace": namespace or ""}
        spec = {
            "user": user.name,
            "groups": list(user.groups),
            "uid": user.uid,
            "extra": {name: list(values) for name, values in user.extra},
            "resourceAttributes": attributes,
        }
        review = await self._create(SubjectAccessReviews, spec)
        return review.get("allowed") is True and review.get("denied") is not True

    async def _create(self, resource: Any, spec: dict[str, Any]) -> dict[str, Any]:
        try:
            made = await self._client.create(resource.from_dict({"spec": spec}))
        except httpx.HTTPError as error:
            # The class alone: a message may repeat what was sent.
            log.warning("a caller of the dashboard could not be reviewed", extra={"cause": type(error).__name__})
            raise ReviewFailed("the API server did not say who is asking, or what they may see") from error
        status: dict[str, Any] = made.get("status") or {}
        return status


def user_of(info: dict[str, Any]) -> User | None:
    """The user that a TokenReview's status names; None without a name."""
    name = info.get("username")
    if not isinstance(name, str) or not name:
        return None
    extra = info.get("extra") or {}
    return User(
        name,
        tuple(str(group) for group in info.get("groups") or ()),
        str(info.get("uid") or ""),
        tuple((str(key), tuple(str(one) for one in values or ())) for key, values in sorted(extra.items())),
    )
