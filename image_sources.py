"""The bytes of an encoded image: behind a URL, in a data URL, or in base64."""

import base64
import binascii
import re
import urllib.request
from http.client import HTTPException
from urllib.parse import quote, unquote_to_bytes, urlsplit

MAX_BYTES = 256 << 20  # of a download
TIMEOUT = 30.0  # seconds without a byte
NO_PIXELS = ("image/svg+xml", "text/html")  # media types that browsers show and Pillow cannot read
SAFE_IN_URLS = "%/:?#[]@!$&'()*+,;=-._~"


def is_url(text: str) -> bool:
    """Tells whether a text is an http(s) URL."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def is_data_url(text: str) -> bool:
    """Tells whether a text is a `data:` URL."""
    return text.lstrip()[:5].lower() == "data:"


def fetch_image(url: str, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT) -> bytes:
    """Downloads the bytes behind an http(s) URL, following redirects.

    The standard library is enough for this, so no HTTP package is required, and
    `HF_HUB_OFFLINE`, which is about the Hub, does not stand in the way of other hosts.

    Raises ValueError when there is no such host, no answer within `timeout` seconds, another
    status than 200, or more than `max_bytes`.
    """
    try:
        request = urllib.request.Request(_ascii(url), headers={"User-Agent": "perceptiondlm"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            data = response.read(max_bytes + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"expected a picture at {url[:200]}, got: {error}") from error
    if len(data) > max_bytes:
        raise ValueError(
            f"expected a picture of at most {max_bytes >> 20} MiB at {url[:200]}, got more"
        )
    return data


def _ascii(url: str) -> str:
    """Encodes the host (IDNA) and whatever else is not allowed in a URL, as browsers do."""
    parts = urlsplit(url)
    if not parts.netloc.isascii():
        parts = parts._replace(netloc=parts.netloc.encode("idna").decode())
    return quote(parts._replace(fragment="").geturl(), safe=SAFE_IN_URLS)


def decode_data_url(url: str, name: str = "an image") -> bytes:
    """Decodes a `data:` URL: any parameters, base64 (see `decode_base64`) or percent-encoding.

    `name` says in errors (ValueError) what was expected.
    """
    head, comma, body = url.strip().partition(",")
    if not comma or not is_data_url(head):
        raise ValueError(f"expected {name} as data:image/...;base64,..., got {url[:60]!r}")

    kind, *parameters = (part.strip().lower() for part in head[5:].split(";"))
    if kind in NO_PIXELS:
        raise ValueError(f"expected {name} as an image of pixels, got {kind}")

    if parameters and parameters[-1] == "base64":
        return decode_base64(unquote_to_bytes(body) if "%" in body else body, name)
    if "%" not in body:  # no format of images has printable bytes alone
        raise ValueError(f"expected {name} in base64 or percent-encoded, got {url[:60]!r}")
    return unquote_to_bytes(body)


def decode_base64(text: str | bytes, name: str = "an image") -> bytes:
    """Decodes base64, also line-wrapped, URL-safe, or without its padding.

    Raises ValueError for any other character, for a mixture of the two alphabets, and for a text
    that is cut off.
    """
    try:
        digits = text.encode("ascii") if isinstance(text, str) else text
        digits = digits.translate(None, b" \t\r\n\f")
        if re.search(rb"[-_]", digits):
            if re.search(rb"[+/]", digits):
                raise ValueError("both of its alphabets at once")
            digits = digits.translate(bytes.maketrans(b"-_", b"+/"))
        bare = digits.rstrip(b"=")
        if len(digits) > len(bare) and len(digits) % 4:
            raise ValueError("the wrong padding")
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"expected {name} in base64, got: {error}") from error
