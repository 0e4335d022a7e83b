"""Which proxy an address is asked through: none on this machine, else the one that the environment names."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def proxy_for(url: str) -> str | None:
    """The environment's HTTP proxy for this address, as other programs take it (`http_proxy`, `no_proxy`, ...).

    None on loopback, which a proxy cannot reach: it has a loopback of its own.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_here(host) or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    named = getproxies()
    proxy = named.get(parts.scheme) or named.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    return proxy if proxy.startswith(("http://", "https://")) else None


def is_here(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
