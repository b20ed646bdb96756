"""Turn exceptions of huggingface_hub into a HubError with a hint.

huggingface_hub raises its own exceptions, those of its HTTP library, and those of the operating system. The user needs
one sentence about the model and one command that helps.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub import errors as hub

from milora_init.errors import HubError, explain, remedy

_NETWORK = (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how hf_xet, which is written in Rust, ends such a message


@contextmanager
def hub_errors(model: str, revision: str | None, *, pushing: bool = False) -> Iterator[None]:
    """Raise HubError instead of the exceptions that huggingface_hub raises in the `with` block.

    Args:
        model: Id of the model, or of the repository to push to.
        revision: The requested branch, tag or commit; None for the default branch.
        pushing: Whether the block writes to the repository. The hints then do not mention downloads.

    Raises:
        HubError: The message names the model. The original exception is its cause.
    """
    try:
        yield
    except hub.GatedRepoError as error:
        hint = f"accept its terms at {constants.ENDPOINT}/{model}, then run `hf auth login`"
        raise HubError(f"{model} is gated: it can be read only after its terms are accepted", hint=hint) from error
    except hub.RevisionNotFoundError as error:
        raise HubError(f"{model} has no revision {revision!r}", hint="name a branch, a tag or a commit") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        problem = "no repository on the Hub" if pushing else "neither a local folder nor a model on the Hub"
        raise HubError(
            f"{model!r} is {problem} that this token can access",
            hint="check the name; for a private repository run `hf auth login`, or set HF_TOKEN",
        ) from error
    except hub.LocalEntryNotFoundError as error:
        status = _http_status(error)
        if pushing or status is not None:
            raise _request_error(model, status, error) from error
        raise _not_in_cache(model, revision) from error
    except hub.EntryNotFoundError as error:
        raise HubError(
            f"a file of {model} is missing on the Hub: {_one_line(error)[:200]}",
            hint="run the same command again" if pushing else "its files may be incomplete; name another revision",
        ) from error
    except hub.HfHubHTTPError as error:
        raise _request_error(model, _http_status(error), error) from error
    except hub.OfflineModeIsEnabled as error:
        if pushing:
            raise HubError(f"{model} cannot be written to: HF_HUB_OFFLINE is set", hint="unset it") from error
        raise _offline(model) from error
    except Exception as error:
        hub_error = _from_foreign_exception(error, model, pushing=pushing)
        if hub_error is None:
            raise
        raise hub_error from error


def _from_foreign_exception(error: Exception, model: str, *, pushing: bool) -> HubError | None:
    """Make a HubError of an exception that is not of huggingface_hub.

    Returns:
        None for our own exceptions, and for those that `milora_init.errors.explain` explains.
    """
    if type(error).__module__.startswith("milora_init"):
        return None
    if of_file := _error_of_a_file(error):
        hint = "run the same command again" if pushing else "name another --cache-dir; finished downloads are kept"
        return HubError(f"{model}: {_one_line(error)[:300]}", hint=remedy(of_file, hint))
    if isinstance(error, PermissionError):  # hf_xet's XetAuthenticationError
        return _request_error(model, 401, error)
    if isinstance(error, KeyError | TypeError | AttributeError):  # huggingface_hub does not check the Hub's answers
        return HubError(
            f"the Hub's answer about {model} is incomplete: {type(error).__name__}: {error}",
            hint="if HF_ENDPOINT names a mirror, try again without it",
        )
    if not isinstance(error, OSError) and explain(error):
        return None
    # No list of classes: huggingface_hub passes on the exceptions of its HTTP library, and versions use different ones.
    return _request_error(model, None, error)


def _error_of_a_file(error: Exception) -> OSError | None:
    """The operating system's error about a file of this machine; None for an error of another kind.

    An OSError can also come from the network. hf_xet raises them for its own network errors, and those have no number.
    """
    found = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(found[1]) if found else None
    if number is None or number in _NETWORK or type(error).__module__ in ("socket", "ssl"):  # with numbers of their own
        return None
    of_number = OSError(number, str(error))  # of the subclass that belongs to the number
    return None if isinstance(of_number, ConnectionError | TimeoutError) else of_number


def _request_error(model: str, status: int | None, error: Exception) -> HubError:
    """Make a HubError of a request that failed, with the HTTP status if there was an answer."""
    if status == 429:
        return HubError(
            f"too many requests to the Hub for {model} (status 429)",
            hint="wait a few minutes; after `hf auth login` the limit is higher",
        )
    if status in (401, 403):
        return HubError(
            f"the Hub gives no access to {model} (status {status})",
            hint="run `hf auth login` with a token that has access, or set HF_TOKEN",
        )
    endpoint = f" and HF_ENDPOINT ({os.environ['HF_ENDPOINT']})" if os.environ.get("HF_ENDPOINT") else ""
    hint = f"check the network{endpoint}, then run the same command again: what is already done is kept"
    if status is not None:  # there was an answer, so the network works
        hint = "look at status.huggingface.co, then run the same command again: what is already done is kept"
        if status < 500:
            hint = "check the names of the repository and the branch, and HF_ENDPOINT if it is set"
    return HubError(
        f"a request to the Hub for {model} failed: {_one_line(error)[:300] or type(error).__name__}", hint=hint
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _http_status(error: BaseException | None) -> int | None:
    """Find the HTTP status in an exception or in the exceptions that caused it; None if there is none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _not_in_cache(model: str, revision: str | None) -> HubError:
    if constants.HF_HUB_OFFLINE:
        return _offline(model)
    name = repr(model) if revision is None else f"{model!r} at revision {revision!r}"
    return HubError(
        f"{name} is neither a local folder nor in the local cache, and the Hub cannot be reached",
        hint=f"name an existing folder, or download the model when there is a network: hf download {model}",
    )


def _offline(model: str) -> HubError:
    return HubError(
        f"{model!r} is neither a local folder nor complete in the local cache, and HF_HUB_OFFLINE is set",
        hint=f"check the name; or unset it, or download the model when there is a network: hf download {model}",
    )
