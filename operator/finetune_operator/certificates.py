"""The progress server's own certificates: an authority that outlives every job, and a certificate that is made anew.

A pod is given the authority's certificate when its attempt is created, and keeps it. So a renewed authority keeps its
key: whoever trusts the certificate that was there before trusts what is signed after, too (RFC 5280, section 6: a trust
anchor is a name and a key).

`python -m finetune_operator.certificates` reads a `Request` and writes a `Made`, as JSON: importing the cryptography
costs 13 MiB, which the operator need not hold for what it does once in two months.
"""

from __future__ import annotations

import ipaddress
import sys
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from finetune_operator.certificate_protocol import Bundle, Made, Request

AUTHORITY_LIFE = timedelta(days=3650)
CERTIFICATE_LIFE = timedelta(days=90)
RENEWAL_SHARE = 1 / 3
"""Renewed when so much of a life is left."""
_CLOCK_SKEW = timedelta(hours=1)
_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator progress")])


def make(request: Request) -> Made:
    """What is to be served: the same bundle while it is good, and as much of it as can be kept where it is not."""
    now = datetime.fromtimestamp(request.now, UTC)
    bundle = request.bundle
    known = _read_authority(bundle)
    if known is None or _left(known[0], now) < RENEWAL_SHARE * AUTHORITY_LIFE:
        authority_key = ec.generate_private_key(ec.SECP256R1()) if known is None else known[1]
        authority = _authority(authority_key, now)
    else:
        authority, authority_key = known
        served = _read_certificate(bundle, authority)
        if served and _serves(served, request.hosts) and _left(served, now) >= RENEWAL_SHARE * CERTIFICATE_LIFE:
            return _made(bundle, served)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key, authority, authority_key, request.hosts, now)
    made = Bundle(ca=_pem(authority), ca_key=_key_pem(authority_key), certificate=_pem(certificate), key=_key_pem(key))
    return _made(made, certificate)


def _made(bundle: Bundle, certificate: x509.Certificate) -> Made:
    expires = certificate.not_valid_after_utc
    return Made(
        bundle=bundle,
        expires_at=expires.timestamp(),
        renew_at=(expires - RENEWAL_SHARE * CERTIFICATE_LIFE).timestamp(),
    )


def _read_authority(bundle: Bundle) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None:
    """The authority and its key; None unless they belong together."""
    try:
        authority = x509.load_pem_x509_certificate(bundle.ca.encode())
        key = serialization.load_pem_private_key(bundle.ca_key.encode(), password=None)
    except (ValueError, TypeError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        return None
    return authority, key


def _read_certificate(bundle: Bundle, authority: x509.Certificate) -> x509.Certificate | None:
    """The server's certificate; None unless it is the authority's, and there with its key."""
    try:
        certificate = x509.load_pem_x509_certificate(bundle.certificate.encode())
        key = serialization.load_pem_private_key(bundle.key.encode(), password=None)
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return None
    return certificate if key.public_key() == certificate.public_key() else None


def _left(certificate: x509.Certificate, now: datetime) -> timedelta:
    return certificate.not_valid_after_utc - now


def _serves(certificate: x509.Certificate, hosts: tuple[str, ...]) -> bool:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names) == {_name(host) for host in hosts}


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    usage = _usage(signs_certificates=True)
    builder = _builder(key.public_key(), now, AUTHORITY_LIFE, usage, x509.BasicConstraints(ca=True, path_length=0))
    return builder.sign(key, hashes.SHA256())


def _certificate(
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    hosts: tuple[str, ...],
    now: datetime,
) -> x509.Certificate:
    usage = _usage(signs_certificates=False)
    constraints = x509.BasicConstraints(ca=False, path_length=None)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    names = x509.SubjectAlternativeName([_name(host) for host in hosts])
    return (
        _builder(key.public_key(), now, CERTIFICATE_LIFE, usage, constraints)
        .subject_name(x509.Name([]))
        .issuer_name(authority.subject)
        .add_extension(issuer, critical=False)
        .add_extension(names, critical=True)  # RFC 5280, 4.2.1.6: critical where the subject is empty
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
    usage: x509.KeyUsage,
    constraints: x509.BasicConstraints,
) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(constraints, critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    return builder.subject_name(_NAME).issuer_name(_NAME) if constraints.ca else builder


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


if __name__ == "__main__":
    sys.stdout.write(make(Request.model_validate_json(sys.stdin.read())).to_json())
