"""Turn exceptions of huggingface_hub into a HubError with a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors as hub

from milora_init.errors import HubError, explain, remedy


@contextmanager
def hub_errors(model: str, revision: str | None, *, pushing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises about a model, or about a repository to push to, into a HubError with a hint."""
    try:
        yield
    except hub.GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/{model}, then `hf auth login`"
        raise HubError(f"{model} is gated", hint=hint) from error
    except hub.RevisionNotFoundError as error:
        raise HubError(f"{model} has no revision {revision!r}", hint="name a branch, a tag or a commit") from error
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        kind = "no repository" if pushing else "neither a folder here nor a model"
        raise HubError(
            f"{model!r} is {kind} on the Hub that this token may see",
            hint="check the name; for a private model `hf auth login`, or set HF_TOKEN",
        ) from error
    except hub.LocalEntryNotFoundError as error:
        status = _status(error)
        if pushing or status is not None:
            raise _refused(model, status, error) from error
        what = repr(model) if revision is None else f"{model!r} at revision {revision!r}"
        raise HubError(
            f"{what} is neither a folder here nor in the local cache, and the Hub cannot be reached",
            hint=f"name an existing folder, or, with a network, fetch it first: hf download {model}",
        ) from error
    except hub.EntryNotFoundError as error:
        raise HubError(
            f"{model} lacks a file that it should have: {' '.join(str(error).split())[:200]}",
            hint="run the same command again" if pushing else "it may be incomplete; name another --revision",
        ) from error
    except hub.HfHubHTTPError as error:
        raise _refused(model, _status(error), error) from error
    except hub.OfflineModeIsEnabled as error:
        if pushing:
            raise HubError(f"{model} cannot be written to: HF_HUB_OFFLINE is set", hint="unset it") from error
        raise HubError(
            f"{model!r} is not whole in the local cache, and HF_HUB_OFFLINE is set",
            hint=f"unset it, or, with a network, fetch the model first: hf download {model}",
        ) from error
    except Exception as error:
        other = _of_other_libraries(error, model, pushing=pushing)
        if other is None:
            raise
        raise other from error


def _of_other_libraries(error: Exception, model: str, *, pushing: bool) -> HubError | None:
    """A HubError for an exception that is not huggingface_hub's own; None for what is explained elsewhere."""
    if isinstance(error, OSError):
        hint = "run the same command again" if pushing else "name another --cache-dir; what was downloaded is kept"
        return HubError(f"{model}: {error}", hint=remedy(error, hint))
    if isinstance(error, KeyError | TypeError | AttributeError):  # huggingface_hub reads answers without checks
        return HubError(
            f"the Hub's answer about {model} is incomplete: {type(error).__name__}: {error}",
            hint="if HF_ENDPOINT names a mirror, that may be the reason: try without it",
        )
    # huggingface_hub lets the errors of its HTTP library through, and that library has changed.
    if type(error).__module__.startswith("milora_init") or explain(error):
        return None
    return _refused(model, None, error)


def _refused(model: str, status: int | None, error: Exception) -> HubError:
    if status == 429:
        return HubError(
            f"the Hub limits the rate of requests for {model}", hint="wait a few minutes; `hf auth login` allows more"
        )
    if status in (401, 403):
        return HubError(
            f"the Hub refuses this token for {model} (status {status})",
            hint="run `hf auth login` with a token that has access, or set HF_TOKEN",
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return HubError(
        f"the Hub failed for {model}: {reason}",
        hint="check the network, then run the same command again: what was done is kept",
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, through what it was raised from."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None
