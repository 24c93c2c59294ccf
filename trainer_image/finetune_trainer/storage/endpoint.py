"""Whether the address of an object store may be called at all."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from finetune_trainer.contract.addresses import endpoint_problem, is_metadata_host
from finetune_trainer.errors import UsageError

LINK_LOCAL_VARIABLE = "FINETUNE_S3_LINK_LOCAL"


def check_endpoint(endpoint: str) -> None:
    """Refuse addresses at which clouds hand out credentials, also behind a name. Raises UsageError.

    The operator has looked at the text already; a name means something only here. One that is not known here is left
    to the client, which explains it.
    """
    if os.environ.get(LINK_LOCAL_VARIABLE) == "true":
        return
    problem = endpoint_problem(endpoint)
    host = urlsplit(endpoint).hostname if not problem else None
    if host is not None:
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError):
            found = set()
        problem = next((f"leads to {one}, which is link-local" for one in sorted(found) if is_metadata_host(one)), "")
    if problem:
        raise UsageError(
            f"the object store {endpoint!r} {problem}; correct output.s3.endpoint", reason="InvalidEndpoint"
        )
