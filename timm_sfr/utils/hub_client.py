"""Errors of the Hugging Face Hub, the network and the disk: reported in one line, and retried where that can help."""

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
from huggingface_hub.utils import get_session
from safetensors import SafetensorError

from timm_sfr.utils.console import logger
from timm_sfr.utils.errors import HubError, UserError, brief

Result = TypeVar("Result")

# HTTP statuses worth a retry. 412: somebody else's commit came in after the one that ours is based on.
TRANSIENT = (408, 412, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4)  # seconds before each retry
RETRY_SECONDS = 10  # no retry starts later than this: huggingface_hub itself has already tried for up to 23 s
PATIENCE = 5  # seconds to wait for a first answer
XET = {"HF_XET_CLIENT_RETRY_MAX_DURATION": "5s"}  # environment variables of hf_xet
HTTP_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")  # their exceptions are network errors


@contextlib.contextmanager
def hub_errors(what: str, again: str = "", token: str | None = None) -> Iterator[None]:
    """Converts errors of the Hub's client, the network and the disk into one `HubError`: ``what: reason; advice``.

    Args:
        what: What failed.
        again: The command to run again, if any. The advice is to run it now if a retry may help, otherwise after a fix.
        token: The token in use, if given. It never appears in the message or its traceback.
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
            text += f"; nothing is lost; {'to try again' if transient(error) else 'once that is fixed'}: {again}"
        secrets = [secret for secret in (token, get_token()) if secret]
        for secret in secrets:
            text = text.replace(secret, "***")
        hub_error = HubError(text)
        hub_error.reason = error
        # The client's message may quote the header with the token; the traceback must then omit it too.
        leaks = any(secret in str(link) for secret in secrets for link in _chain(error))
        raise hub_error from (None if leaks else error)


@contextlib.contextmanager
def quick_offline() -> Iterator[None]:
    """A context in which a Hub that does not answer counts as offline: files in the cache load, and others fail at once.

    huggingface_hub itself tries for most of a minute, and logs each attempt.
    """
    if constants.HF_HUB_OFFLINE or _answers():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers() -> bool:
    """Returns whether the Hub gives any answer within seconds, by the client's own connection and proxies."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:
        return not network(error)
    return True


def check_token(token: str | None) -> str | None:
    """Returns `token` without surrounding whitespace.

    Raises:
        UserError: if it cannot be a token; the message does not repeat it.
    """
    if token is None:
        return None
    clean = token.strip()
    if not clean or not clean.isascii() or not clean.isprintable() or " " in clean:
        raise UserError("token: expected one word of ASCII letters (hf_...); got something else")
    return clean


def retried(action: Callable[[], Result]) -> Result:
    """Returns the result of `action`, tried up to four times on transient errors such as a lost network or a busy server."""
    started, waits = time.monotonic(), iter(WAITS)
    while True:
        try:
            return action()
        except Exception as error:
            wait = next(waits, None)
            if wait is None or not transient(error) or time.monotonic() - started > RETRY_SECONDS:
                raise
            logger.warning(f"the Hub: {reason(error)}; trying again in {wait} s")
        time.sleep(wait)


@contextlib.contextmanager
def bounded_xet() -> Iterator[None]:
    """Limits retries of an hf_xet request inside to five seconds; by default hf_xet retries for minutes.

    hf_xet reads its limits when huggingface_hub opens a session, which downloads do too. This therefore ends any open session
    before and after.
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


def transient(error: BaseException) -> bool:
    """Returns whether a retry may help."""
    if any(isinstance(link, (OfflineModeIsEnabled, LocalTokenNotFoundError)) for link in _chain(error)):
        return False
    code = status(error)
    return code in TRANSIENT if code is not None else network(error)


def status(error: BaseException) -> int | None:
    """Returns the HTTP status of the server's answer, or None without an answer."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if response is not None:
            return response.status_code
        # hf_xet raises Python's own ConnectionError even for an answer, with the status in its text.
        found = re.search(r"HTTP status \w+ error \((\d{3})", str(link)) if type(link) is ConnectionError else None
        if found is not None:
            return int(found[1])
    return None


def network(error: BaseException) -> bool:
    """Returns whether the server could not be reached or the connection was lost."""
    return any(
        isinstance(link, (ConnectionError, TimeoutError)) or type(link).__module__.startswith(HTTP_CLIENTS)
        for link in _chain(error)
    )


def reason(error: BaseException, token: str | None = None) -> str:
    """Returns the reason for the error in words, on one line; `token` is the token in use, if given."""
    links, code, server = list(_chain(error)), status(error), constants.ENDPOINT
    full = next((x for x in links if isinstance(x, OSError) and x.errno == errno.ENOSPC), None)
    if full is not None:
        return f"the disk is full ({full.filename or constants.HF_HUB_CACHE})"
    if _any(links, OfflineModeIsEnabled) and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    refused = code == 401 and not _any(links, RepositoryNotFoundError)
    if _any(links, LocalTokenNotFoundError) or (refused and not token and not get_token()):
        return "no token was found; run `hf auth login`, or set HF_TOKEN"
    if refused or any(re.search("Invalid (credentials|username)", str(link)) for link in links):
        return f"{server} refused the token (401); run `hf auth login`, or set HF_TOKEN to a valid one"
    if _any(links, GatedRepoError):
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
    if any(type(link) is ConnectionError for link in links):  # hf_xet raises Python's own class
        return f"cannot reach the storage (Xet) of {server}"
    if network(error) or _any(links, LocalEntryNotFoundError) or _any(links, OfflineModeIsEnabled):
        return f"cannot reach {server}"
    return brief(links[0])


def _end_xet_session() -> None:
    # huggingface_hub itself ends sessions this way when an upload fails. In a release without it, the limit may not apply.
    with contextlib.suppress(ImportError):
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()


def _expected(error: BaseException) -> bool:
    """Returns whether the error comes from outside (network, server, disk) rather than from a bug in this program."""
    kinds = (OSError, ValueError, RuntimeError, SafetensorError, HfHubHTTPError)
    return isinstance(error, kinds) or network(error) or status(error) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and its causes."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _any(links: list[BaseException], kind: type) -> bool:
    return any(isinstance(link, kind) for link in links)


def _quoted(links: list[BaseException]) -> str:
    """Returns the server's message after a colon, or an empty string without one."""
    message = next((link.server_message for link in links if getattr(link, "server_message", None)), "")
    return f": {' '.join(message.split())[:200]}" if message else ""
