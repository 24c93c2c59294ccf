"""Whose token is this? Asked of the API server (authentication.k8s.io/v1 TokenReview)."""

from __future__ import annotations

import logging
from typing import Any

import httpx2 as httpx
from lightkube import AsyncClient
from lightkube.generic_resource import create_global_resource

from finetune_operator import constants as c
from finetune_operator.claims import Caller
from finetune_operator.errors import ReviewFailed

TokenReviews = create_global_resource("authentication.k8s.io", "v1", "TokenReview", "tokenreviews")
log = logging.getLogger(__name__)

_POD_NAME = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_USER = "system:serviceaccount:"


class TokenReviewer:
    """Turns a bound service account token into the pod that it was made for."""

    def __init__(self, client: AsyncClient) -> None:
        self._client: Any = client  # lightkube's overloads leave generic resources out

    async def __call__(self, token: str) -> Caller | None:
        """The pod, or None when the token is not valid for our audience or belongs to no pod. Raises ReviewFailed."""
        body = {"spec": {"token": token, "audiences": [c.PROGRESS_AUDIENCE]}}
        try:
            review = await self._client.create(TokenReviews.from_dict(body))
        except httpx.HTTPError as error:
            log.warning("a token could not be reviewed", extra={"cause": repr(error)})
            raise ReviewFailed("the API server did not say whose token this is") from error
        return caller_of(review.get("status") or {})


def caller_of(status: dict[str, Any]) -> Caller | None:
    """The pod that a TokenReview's status names; None unless it is authenticated, for our audience, and of a pod."""
    if status.get("authenticated") is not True or c.PROGRESS_AUDIENCE not in (status.get("audiences") or []):
        return None
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    namespace = str(user.get("username", "")).removeprefix(_USER).partition(":")[0]
    pod, uid = (extra.get(_POD_NAME) or [""])[0], (extra.get(_POD_UID) or [""])[0]
    if not (str(user.get("username", "")).startswith(_USER) and namespace and pod and uid):
        return None
    return Caller(namespace, pod, uid)
