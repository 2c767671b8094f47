"""Fetches an image from a host that the server allows by name, and from nowhere else.

Every address that the host's name stands for is looked at before, and the connection goes to the one that was: a name
cannot lead to this machine or its network, neither at once nor by a redirect.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from .errors import ApiError, invalid

SECONDS = 10.0  # for a connection, and without anything to read
IN_ALL = 30.0  # seconds for an image
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PART = 1 << 16  # bytes that are read at once
REDIRECTS = 3


def fetch(url: str, hosts: Sequence[str], most_bytes: int, where: str) -> bytes:
    """The bytes at a URL. Raises ApiError, ``where`` in front: which part of the request it stands in."""
    for _ in range(1 + REDIRECTS):
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".")
        except ValueError as err:
            raise invalid(f"{where}: {url!r:.60} is no URL: {err}", where) from err
        if not host or host not in {known.lower() for known in hosts}:
            known = ", ".join(hosts) or "none"
            raise invalid(
                f"{where}: images from {host!r:.60} are not fetched (hosts that are: {known}); send it as a data: URL",
                where,
                code="invalid_image_url",
            )
        try:
            found = _get(parts, most_bytes, where)
        except (OSError, http.client.HTTPException, ValueError) as err:
            raise invalid(
                f"{where}: {url!r:.60} cannot be fetched: {err}", where, code="invalid_image_url"
            ) from err
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise invalid(
        f"{where}: {url!r:.60} redirects more than {REDIRECTS} times", where, code="invalid_image_url"
    )


def _get(parts: SplitResult, most_bytes: int, where: str) -> bytes | str:
    """The bytes at a URL, or where it redirects to."""
    assert parts.hostname is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = public_address(parts.hostname, port, where)
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=SECONDS)
    plain = socket.create_connection((address, port), SECONDS)
    try:
        secured = parts.scheme == "https"
        connection.sock = (
            ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
            if secured
            else plain
        )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "ppexport"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.getheader("Location", "")
        if response.status != 200:
            raise ValueError(f"the host answers {response.status}")
        return _read(response, most_bytes, where)
    finally:
        connection.close()
        plain.close()


def _read(response: http.client.HTTPResponse, most_bytes: int, where: str) -> bytes:
    """A body that is neither too long nor too slow."""
    end = time.monotonic() + IN_ALL
    found = bytearray()
    while part := response.read(PART):
        found += part
        if len(found) > most_bytes:
            most = f"{most_bytes / (1 << 20):g} MiB"
            raise ApiError(413, f"{where}: the image takes more than {most}", where, code="image_too_large")
        if time.monotonic() > end:
            raise ValueError(f"it takes more than {IN_ALL:g} s")
    return bytes(found)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Of the internet, and no way to say another address."""
    if address.is_multicast or not address.is_global:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return True
    translated = address.sixtofour or address.teredo or address in NAT64
    return not (address.is_site_local or translated)


def public_address(host: str, port: int, where: str) -> str:
    """An address of a host; raises ApiError if any is of this machine or of a private network."""
    found = [str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not _is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise invalid(
                f"{where}: {host!r:.60} is {address}, expected a public address",
                where,
                code="invalid_image_url",
            )
    return found[0]
