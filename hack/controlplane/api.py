"""A small HTTPS client for the control plane's own servers, and kubeconfig files."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import ssl
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ApiError
from .pki import KeyPair

_SECONDS = 10.0
_UNREACHABLE = (OSError, http.client.HTTPException)


class Client:
    """Speaks to one server, which must hold a certificate of our authority."""

    def __init__(self, url: str, authority: Path, identity: KeyPair) -> None:
        self.url = url
        address = urllib.parse.urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 443
        self._tls = ssl.create_default_context(cafile=str(authority))
        self._tls.load_cert_chain(identity.certificate, identity.key)

    def send(self, method: str, path: str, body: bytes | None = None, content_type: str = "") -> tuple[int, bytes]:
        """One request. Returns status and body; raises OSError where no server answers."""
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=_SECONDS, context=self._tls)
        try:
            headers = {"Content-Type": content_type} if content_type else {}
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__} from {self.url}{path}: {error}") from error
        finally:
            connection.close()

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | str | None = None,
        content_type: str = "application/json",
    ) -> Any:
        """One request to the API server.

        body: an object, or text that is sent as it is (set content_type to what it holds).
        Returns the decoded answer, or its text where it is not JSON.

        Raises:
            ApiError: any status from 400 on.
        """
        data = body if isinstance(body, str) or body is None else json.dumps(body)
        try:
            status, answer = self.send(method, path, data.encode() if data is not None else None, content_type)
        except OSError as error:
            raise ApiError(0, f"{method} {path}: no answer from {self.url}: {error}") from error
        text = answer.decode("utf-8", errors="replace")
        if status >= 400:
            raise ApiError(status, f"{method} {path} answered {status}: {_reason(text)}")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def missing(self, path: str, expected: str = "") -> str:
        """What keeps a GET of `path` from answering 200 with `expected` in it; "" if nothing does."""
        try:
            status, body = self.send("GET", path)
        except OSError as error:
            return f"GET {self.url}{path}: {error}"
        text = body.decode("utf-8", errors="replace")
        if status == 200 and expected in text:
            return ""
        return f"GET {self.url}{path} answered {status}: {_reason(text)}"

    def create_all(self, manifest: Path, collection: str) -> None:
        """Create every YAML document of a file in one collection; what exists is left alone."""
        text = manifest.read_text(encoding="utf-8")
        for document in re.split(r"(?m)^---\s*$", text):
            if not any(line[:1].isalpha() or line[:1] == "{" for line in document.splitlines()):
                continue  # only comments
            try:
                self.request("POST", collection, document, "application/yaml")
            except ApiError as error:
                if error.status != 409:
                    raise ApiError(error.status, f"{manifest}: {error}") from error


def _reason(text: str) -> str:
    try:
        decoded = json.loads(text)
    except ValueError:
        return text[:2000].strip()
    return str(decoded.get("message", decoded) if isinstance(decoded, dict) else decoded)[:2000]


def plain_missing(url: str) -> str:
    """As Client.missing, for a server on the loopback address without TLS."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=_SECONDS)
    try:
        connection.request("GET", address.path)
        response = connection.getresponse()
        text = response.read().decode("utf-8", errors="replace")
    except _UNREACHABLE as error:
        return f"GET {url}: {error}"
    finally:
        connection.close()
    return "" if response.status == 200 else f"GET {url} answered {response.status}: {text[:500]}"


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def certificate_user(identity: KeyPair) -> dict[str, str]:
    """The kubeconfig user of a client certificate."""
    return {
        "client-certificate-data": _encoded(identity.certificate),
        "client-key-data": _encoded(identity.key),
    }


def write_kubeconfig(
    path: Path, url: str, authority: Path, user: Mapping[str, str], namespace: str = "default"
) -> Path:
    """A self-contained kubeconfig (JSON, which is YAML too), readable by its owner only."""
    cluster = {"server": url, "certificate-authority-data": _encoded(authority)}
    context = {"cluster": "controlplane", "user": "user", "namespace": namespace}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "controlplane", "cluster": cluster}],
        "users": [{"name": "user", "user": dict(user)}],
        "contexts": [{"name": "controlplane", "context": context}],
        "current-context": "controlplane",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(content, file, indent=1)
    return path
