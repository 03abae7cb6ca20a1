"""Fetches images behind URLs that a client names: from allowed hosts only, never from inside.

Off unless hosts are allowed. A name is resolved once, every address it has must be public, and
the connection goes to the very address that was checked, so that a name which changes its answer
gains nothing. Redirects are followed by hand, each checked like the first URL.
"""

import ipaddress
import socket
import time
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from ...common.extras import extra
from .limits import Limits

REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64: the last 32 bits are an IPv4 address
# Not of the public internet either, though not every version of `ipaddress` knows it.
NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "::/96",  # once IPv4-compatible
            "64:ff9b:1::/48",  # NAT64 of a local network
            "192.0.0.0/24",  # protocol assignments
            "192.88.99.0/24",  # 6to4 relays
            "3fff::/20",  # documentation
            "5f00::/16",  # segment routing
            "fec0::/10",  # site-local
        ),
    )
)


@dataclass(frozen=True)
class UrlPolicy:
    """Which URLs are fetched.

    Attributes:
        hosts: names, `name:port` for other than the usual ports, or "*" for every host; none:
            nothing is fetched.
        allow_private: also from loopback, private and link-local addresses.
        seconds: to fetch all images of a request, redirects included.
    """

    hosts: frozenset[str] = frozenset()
    allow_private: bool = False
    seconds: float = 10.0

    def check(self, url: str) -> tuple[str, str, int]:
        """Returns scheme, host and port of a URL; raises ValueError for one that is not allowed."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise ValueError(f"expected a URL, got {url[:80]!r}: {error}") from error
        if parts.scheme not in PORTS or not host:
            raise ValueError(f"expected an image as data URL or from http(s), got {url[:60]!r}")
        if parts.username is not None or parts.password is not None:
            raise ValueError("expected a URL without a user name or password")
        if not self.hosts:
            raise ValueError("expected an image as data URL: this server fetches no URLs")

        usual = port in (None, PORTS[parts.scheme])
        name = host if usual else f"{host}:{port}"
        if name not in self.hosts and not ("*" in self.hosts and (usual or self.allow_private)):
            raise ValueError(f"expected a URL of an allowed host, got {name[:80]!r}")
        return parts.scheme, host, port or PORTS[parts.scheme]

    def resolve(self, host: str, port: int) -> str:
        """Returns one address of a host; raises ValueError unless all that it has are public."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ValueError(f"expected a known host, got {host[:80]!r}: {error}") from error
        addresses = [entry[4][0].partition("%")[0] for entry in found]
        if not self.allow_private:
            for address in addresses:
                if not is_public(address):
                    raise ValueError(f"expected a host with public addresses, got {host[:80]!r}")
        return addresses[0]


def is_public(address: str) -> bool:
    """Says whether an address is of the public internet; looks through IPv4 inside IPv6."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    listed = any(ip in network for network in NOT_PUBLIC)  # a network of another version has none
    return ip.is_global and not ip.is_multicast and not listed


def fetch(url: str, policy: UrlPolicy, limits: Limits, deadline: float | None = None) -> bytes:
    """Returns the bytes behind a URL; raises ValueError where the policy or a limit forbids it.

    `deadline`, in terms of `time.monotonic`, is by default the policy's seconds from now.
    """
    with extra("apps"):
        import httpx

    if deadline is None:
        deadline = time.monotonic() + policy.seconds
    with httpx.Client(trust_env=False, follow_redirects=False) as client:
        for _ in range(REDIRECTS + 1):
            try:
                target = _fetch_once(client, url, policy, limits, deadline)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ValueError(f"expected an image from {url[:80]!r}, got: {error}") from error
            if isinstance(target, bytes):
                return target
            url = target
    raise ValueError(f"expected at most {REDIRECTS} redirects, got more")


def _fetch_once(client, url: str, policy: UrlPolicy, limits: Limits, deadline: float):
    """Returns the content, or the URL that a redirect names."""
    scheme, host, port = policy.check(url)
    address = policy.resolve(host, port)

    # The connection goes to the address; name and certificate are still the host's.
    literal = f"[{address}]" if ":" in address else address
    parts = urlsplit(url)
    pinned = parts._replace(netloc=f"{literal}:{port}", fragment="").geturl()
    usual = port == PORTS[scheme]
    shown = f"[{host}]" if ":" in host else host
    request = client.build_request(
        "GET",
        pinned,
        headers={
            "Host": shown if usual else f"{shown}:{port}",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        },
        timeout=_left(deadline),
        extensions={"sni_hostname": host, "timeout": _timeouts(deadline)},
    )

    response = client.send(request, stream=True)
    try:
        if response.is_redirect:
            return urljoin(url, response.headers.get("location", ""))
        if response.status_code != 200:
            raise ValueError(f"expected an image from {url[:80]!r}, got {response.status_code}")
        return _read(response, limits, deadline)
    finally:
        response.close()


def _read(response, limits: Limits, deadline: float) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("expected an image sent as it is, got a compressed response")
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > limits.body_bytes:
            raise ValueError(f"expected an image of at most {limits.body_bytes:,} bytes, got more")
        _left(deadline)
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise ValueError("expected an image in time, the host took too long")
    return left


def _timeouts(deadline: float) -> dict[str, float]:
    return dict.fromkeys(("connect", "read", "write", "pool"), _left(deadline))
