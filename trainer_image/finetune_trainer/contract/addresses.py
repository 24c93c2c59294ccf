"""Addresses at which clouds hand out credentials to whoever asks from a node. Pure: names are not looked up here."""

from __future__ import annotations

import ipaddress
import socket
import unicodedata
from urllib.parse import urlsplit

_NAMES = frozenset(
    {
        "instance-data",
        "instance-data.ec2.internal",
        "metadata",
        "metadata.azure.internal",
        "metadata.goog",
        "metadata.google.internal",
        "metadata.tencentyun.com",
    }
)
_NETWORKS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",  # link-local: AWS, Azure, Google Cloud, Oracle, DigitalOcean, OpenStack, ECS, EKS
        "100.100.100.200/32",  # Alibaba Cloud
        "168.63.129.16/32",  # Azure's wire server
        "192.0.0.192/32",  # Oracle Cloud, older
        "fe80::/10",  # link-local
        "fd00:ec2::/32",  # AWS
        "fd20:ce::254/128",  # Google Cloud
        "fd00:c1::a9fe:a9fe/128",  # Oracle Cloud
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are an IPv4 address."""


def endpoint_problem(url: str) -> str:
    """Why an http(s) URL that a stranger wrote must not be called; empty where nothing is wrong with it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"is not a URL: {error}; write https://host[:port]"
    if parts.scheme not in ("http", "https") or not host:
        return "is not a URL; write https://host[:port]"
    if "@" in parts.netloc or "\\" in url or any(ord(one) < 33 for one in url):
        return "holds a user name, a backslash or a blank; write https://host[:port]"
    if is_metadata_host(host):
        return f"{host} is link-local or a cloud's metadata service, which hands out credentials"
    return ""


def is_metadata_host(host: str) -> bool:
    """Whether a host, as it stands in a URL or as it was looked up, is such an address, in whatever spelling."""
    # As the resolver's IDNA has it: full-width digits and dots are digits and dots.
    plain = unicodedata.normalize("NFKC", host).replace("\u3002", ".").strip("[]").rstrip(".").lower()
    if plain in _NAMES:
        return True
    address = _address(plain.partition("%")[0])
    return address is not None and any(address in network for network in _NETWORKS)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a text means to the C library; None for a name."""
    try:
        # Takes what connect() takes, too: decimal, octal and hexadecimal numbers, and fewer than four of them.
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except (OSError, ValueError):
        pass
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return None
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and (address in _NAT64 or int(address) >> 32 == 0):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return inner or address
