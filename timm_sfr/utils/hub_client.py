"""What can go wrong between here and the Hub: told in one line, and tried again where that helps."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from timm_sfr.utils.errors import HubError, UserError, brief

Result = TypeVar("Result")

# 412: somebody else's commit came between ours and what it was made on.
TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4)  # seconds before each further try
RETRY_SECONDS = 10  # seconds after which no further try begins: huggingface_hub has tried for up to 23 by itself
XET = {"HF_XET_CLIENT_RETRY_MAX_DURATION": "5s"}
HTTP_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")


@contextlib.contextmanager
def hub_errors(what: str, again: str = "", token: str | None = None) -> Iterator[None]:
    """Turns what the Hub's client, the network and the disk raise inside into one `HubError`: ``what: reason; advice``.

    The advice is to do `again`, if given: at once where that may help, else once the reason is gone. The token never is a
    part of it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _expected(error):
            raise
        text = f"{what}: {reason(error, token)}"
        if again:
            text += f"; nothing is lost; {'to try again' if transient(error) else 'once that is put right'}: {again}"
        secrets = [secret for secret in (token, get_token()) if secret]
        for secret in secrets:
            text = text.replace(secret, "***")
        told_off = HubError(text)
        told_off.reason = error
        # A client's own message may quote the header that it sent: then it is left out of the traceback too.
        leaks = any(secret in str(link) for secret in secrets for link in _chain(error))
        raise told_off from (None if leaks else error)


def check_token(token: str | None) -> str | None:
    """`token` without blanks around it.

    Raises:
        UserError: if it can be no token; its text is not repeated.
    """
    if token is None:
        return None
    clean = token.strip()
    if not clean or not clean.isascii() or not clean.isprintable() or " " in clean:
        raise UserError("token: expected one word of ASCII letters (hf_...); got something else")
    return clean


def retried(action: Callable[[], Result], say: Callable[[str], None]) -> Result:
    """What `action` gives, tried up to four times while it fails by something that passes: the network, a busy server."""
    started, waits = time.monotonic(), iter(WAITS)
    while True:
        try:
            return action()
        except Exception as error:
            wait = next(waits, None)
            if wait is None or not transient(error) or time.monotonic() - started > RETRY_SECONDS:
                raise
            say(f"the Hub: {reason(error)}; trying again in {wait} s")
        time.sleep(wait)


@contextlib.contextmanager
def bounded_xet() -> Iterator[None]:
    """Has uploads by hf_xet inside give up a request after five seconds in which it fails; by itself it tries for minutes.

    hf_xet reads its limits when huggingface_hub opens a session, and downloads open one too: so one is opened for this alone.
    """
    added = {name: value for name, value in XET.items() if name not in os.environ}
    os.environ.update(added)
    _end_xet_session()
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        _end_xet_session()


def _end_xet_session() -> None:
    # huggingface_hub ends it so itself when an upload fails; where a release has no such thing, the bound may not hold.
    with contextlib.suppress(ImportError):
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()


def transient(error: BaseException) -> bool:
    """Whether trying again may help."""
    if any(isinstance(link, (OfflineModeIsEnabled, LocalTokenNotFoundError)) for link in _chain(error)):
        return False
    code = status(error)
    return code in TRANSIENT if code is not None else network(error)


def status(error: BaseException) -> int | None:
    """The HTTP status that the server answered with, if it did."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None:
            return response.status_code
        # hf_xet raises Python's own ConnectionError for an answer, too, with the status in its text.
        found = re.search(r"HTTP status \w+ error \((\d{3})", str(link)) if type(link) is ConnectionError else None
        if found is not None:
            return int(found[1])
    return None


def network(error: BaseException) -> bool:
    """Whether the server could not be reached, or was lost."""
    return any(
        isinstance(link, (ConnectionError, TimeoutError)) or type(link).__module__.startswith(HTTP_CLIENTS)
        for link in _chain(error)
    )


def reason(error: BaseException, token: str | None = None) -> str:
    """Why, in words, without a line break; `token` is the one that was given, if one was."""
    links, code, server = list(_chain(error)), status(error), constants.ENDPOINT
    full = next((x for x in links if isinstance(x, OSError) and x.errno == errno.ENOSPC), None)
    if full is not None:
        return f"the disk is full ({full.filename or constants.HF_HUB_CACHE})"
    if _any(links, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    refused = code == 401 and not _any(links, RepositoryNotFoundError)
    if _any(links, LocalTokenNotFoundError) or (refused and not token and not get_token()):
        return "no token was found; run `hf auth login`, or set HF_TOKEN"
    if refused or _said(links, "Invalid credentials", "Invalid username"):
        return f"{server} refused the token (401); run `hf auth login`, or set HF_TOKEN to a valid one"
    gated = next((link for link in links if isinstance(link, GatedRepoError)), None)
    if gated is not None:
        return f"it is gated; log in, and ask for access on its page at {server}"
    if code == 403:
        return (
            "no right to write there (403): it needs a token with write access, and a name under your own user or organisation"
            + _quoted(links)
        )
    if _any(links, RevisionNotFoundError):
        return "it has no such revision"
    if _any(links, EntryNotFoundError) and not _any(links, LocalEntryNotFoundError):
        return brief(links[0])
    if _any(links, RepositoryNotFoundError) or code == 404:
        return f"{server} has no such repository, or it is private and you are not logged in"
    if code == 412:
        return "somebody else's commit came in between (412)"
    if code is not None:
        return f"{server} answered {code}{_quoted(links)}"
    if any(type(link) is ConnectionError for link in links):  # Python's own is hf_xet's
        return f"cannot reach the storage (Xet) of {server}"
    if network(error) or _any(links, LocalEntryNotFoundError):
        return f"cannot reach {server}"
    return brief(links[0])


def _expected(error: BaseException) -> bool:
    """Whether this is the world's doing rather than a fault of this program."""
    kinds = (OSError, ValueError, RuntimeError, SafetensorError, HfHubHTTPError)
    return isinstance(error, kinds) or network(error) or status(error) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _any(links: list[BaseException], kind: type) -> bool:
    return any(isinstance(link, kind) for link in links)


def _said(links: list[BaseException], *texts: str) -> bool:
    return any(text in str(link) for link in links for text in texts)


def _quoted(links: list[BaseException]) -> str:
    """What the server said of it, after a colon."""
    said = next((link.server_message for link in links if getattr(link, "server_message", None)), "")
    return f": {' '.join(said.split())[:200]}" if said else ""
