"""Sees to it that the page's buttons are pressed on the page: no other site can press them.

A browser gets a signed cookie that it sends to this site alone, and the forms of its page a token
that fits the cookie. Another site can make a browser send a form, but can read neither.
"""

from __future__ import annotations

import hmac
import secrets
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from flask import Request, Response

from ml_backend.errors import ForbiddenError, SettingsError

__all__ = ["FormGuard", "has_own_origin"]

_COOKIE = "sam-status-page"
_KEY_BYTES = 32
_AGAIN = "open the status page again, and press the button there"


class FormGuard:
    """Hands out tokens for forms and checks what comes back; all processes share one key."""

    def __init__(self, data_dir: Path) -> None:
        """Read the key from `data_dir`, where the first process puts it.

        Raises:
            SettingsError: If it can be neither read nor written.
        """
        try:
            self._key = _shared_key(data_dir / "page.key")
        except OSError as error:
            raise SettingsError(
                f"DATA_DIR must be a folder that can be written to, got {data_dir} "
                f"({error.strerror}); create it for this user, or set another one"
            ) from error

    def visitor_of(self, request: Request) -> str | None:
        """Tell who a browser is by its cookie; None if it has none of ours."""
        visitor, _, signature = request.cookies.get(_COOKIE, "").partition(".")
        is_ours = _is_equal(signature, self._sign("cookie", visitor))
        return visitor if visitor and is_ours else None

    def new_visitor(self) -> str:
        """Name a browser that was not here before."""
        return secrets.token_hex(16)

    def keep(self, visitor: str, response: Response, request: Request) -> None:
        """Give a browser its cookie, until it is closed."""
        response.set_cookie(
            _COOKIE,
            f"{visitor}.{self._sign('cookie', visitor)}",
            httponly=True,
            samesite="Strict",
            secure=request.is_secure,
        )

    def token(self, visitor: str) -> str:
        """Make the token that a browser's forms carry as `token`."""
        return self._sign("form", visitor)

    def check(self, request: Request) -> None:
        """See that a form was sent from the page.

        Raises:
            ForbiddenError: If another site sent it, or its token does not fit the cookie.
        """
        if not _is_same_site(request):
            raise ForbiddenError(
                f"a button must be pressed on the status page, got a form of another site; {_AGAIN}"
            )
        visitor = self.visitor_of(request)
        token = request.form.get("token", "")
        if visitor is None or not _is_equal(token, self.token(visitor)):
            raise ForbiddenError(
                f"a form must carry the token of its page, got another or none; {_AGAIN}"
            )

    def _sign(self, purpose: str, visitor: str) -> str:
        return hmac.digest(self._key, f"{purpose} {visitor}".encode(), "sha256").hex()


def _is_same_site(request: Request) -> bool:
    """Believe the browser, which no page can make say something else."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:  # sent to https addresses and to this machine only
        return site == "same-origin"
    return has_own_origin(request)


def has_own_origin(request: Request) -> bool:
    """Say whether a request names this very address as the page that sent it."""
    origin = request.headers.get("Origin", "")
    return bool(origin) and urlsplit(origin).netloc == request.host


def _is_equal(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _shared_key(path: Path) -> bytes:
    with FileLock(path.with_suffix(".lock")):
        key = path.read_bytes() if path.exists() else b""
        if len(key) != _KEY_BYTES:
            key = secrets.token_bytes(_KEY_BYTES)
            with tempfile.NamedTemporaryFile(  # which only this user may read
                dir=path.parent, prefix=".", delete=False
            ) as file:
                file.write(key)
            Path(file.name).replace(path)
    return key
