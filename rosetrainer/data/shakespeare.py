"""Tiny-shakespeare (Karpathy's char-rnn), downloaded."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request

from rosetrainer.environment import prepare_command
from rosetrainer.validation import ConfigError

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 10  # seconds


def download() -> str:
    """The text. Raises ConfigError if it cannot be had, or is not what it was."""
    hint = f"pass a file that you have: `{prepare_command()} shakespeare PATH`"
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as reply:
            data: bytes = reply.read(2_000_000)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"cannot download {URL} ({reason}); {hint}") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ConfigError(f"{URL} gave {len(data)} bytes that are not tiny-shakespeare; {hint}")
    return data.decode()
