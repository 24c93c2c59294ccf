"""Certificates and keys of one control plane, made with the openssl command.

The command rather than a Python package: every machine that can reach a cluster has it,
and nothing has to be installed to start a control plane.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import CertificatesFailed

_DAYS = "30"
_CURVE = ("-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_EXTENSIONS = """\
[req]
distinguished_name = name
prompt = no
[name]
[authority]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign, digitalSignature
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = IP:127.0.0.1, IP:10.0.0.1, DNS:localhost, DNS:kubernetes, \
DNS:kubernetes.default, DNS:kubernetes.default.svc, DNS:kubernetes.default.svc.cluster.local
"""


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, both PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority that lives as long as its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700)
        (folder / "openssl.cnf").write_text(_EXTENSIONS, encoding="utf-8")
        self.certificate = folder / "ca.crt"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", *_CURVE, "-days", _DAYS),
            *("-config", "openssl.cnf", "-extensions", "authority", "-subj", "/CN=controlplane"),
            *("-keyout", "ca.key", "-out", "ca.crt"),
        )

    def issue(self, name: str, subject: str) -> KeyPair:
        """A certificate for a server on the loopback address, or a client.

        subject: as openssl writes it: "/O=group/CN=user".
        """
        self._openssl(
            *("req", "-new", "-newkey", "ec", *_CURVE, "-config", "openssl.cnf"),
            *("-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        self._openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-days", _DAYS, "-extfile", "openssl.cnf", "-extensions", "leaf"),
            *("-out", f"{name}.crt"),
        )
        return KeyPair(self._folder / f"{name}.crt", self._folder / f"{name}.key")

    def signing_key(self, name: str) -> tuple[Path, Path]:
        """The private and the public half of a key that signs tokens."""
        self._openssl(
            *("genpkey", "-algorithm", "EC", *_CURVE[:2], "-out", f"{name}.key"),
        )
        self._openssl("pkey", "-in", f"{name}.key", "-pubout", "-out", f"{name}.pub")
        return self._folder / f"{name}.key", self._folder / f"{name}.pub"

    def _openssl(self, *arguments: str) -> None:
        program = shutil.which("openssl")
        if program is None:
            raise CertificatesFailed(
                "the openssl command is not on PATH, and certificates cannot be made without it: "
                "install the package openssl"
            )
        done = subprocess.run(
            [program, *arguments],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            raise CertificatesFailed(f"`openssl {' '.join(arguments)}` failed: {done.stderr}")
