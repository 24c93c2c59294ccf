"""What the operator and the process that makes its certificates say to each other."""

from __future__ import annotations

from finetune_operator.api.base import ApiModel


class Bundle(ApiModel):
    """The authority and the server's certificate, each with its key; all PEM, and empty where it is missing."""

    ca: str = ""
    ca_key: str = ""
    certificate: str = ""
    key: str = ""


class Request(ApiModel):
    """What is to be served by whom."""

    now: float
    """Seconds since the epoch."""
    hosts: tuple[str, ...]
    """DNS names or IP addresses of the server."""
    bundle: Bundle = Bundle()
    """What is there."""


class Made(ApiModel):
    """What is to be served now."""

    bundle: Bundle
    expires_at: float
    """Seconds since the epoch, of the server's certificate."""
    renew_at: float
    """When to ask again, in seconds since the epoch."""
