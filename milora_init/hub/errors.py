"""Turn exceptions of huggingface_hub into a HubError with a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors as hub

from milora_init.errors import HubError, explain, remedy


@contextmanager
def hub_errors(model: str, revision: str | None, *, pushing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises over a model, or a repository to push to, into a HubError with a repair."""
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
        if (status := _status(error)) is not None:
            raise _refused(model, status, error) from error
        if pushing:
            raise _refused(model, None, error) from error
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
    except HubError:
        raise
    except hub.OfflineModeIsEnabled as error:
        if pushing:
            raise HubError(f"{model} cannot be written to: HF_HUB_OFFLINE is set", hint="unset it") from error
        raise HubError(
            f"{model!r} is not whole in the local cache, and HF_HUB_OFFLINE is set",
            hint=f"unset it, or, with a network, fetch the model first: hf download {model}",
        ) from error
    except OSError as error:
        hint = "run the same command again" if pushing else "name another --cache-dir; what was fetched is kept"
        raise HubError(f"{model}: {error}", hint=remedy(error, hint)) from error
    except (KeyError, TypeError, AttributeError) as error:  # huggingface_hub takes answers apart without a check
        raise HubError(
            f"the Hub's answer over {model} is not what it should be: {type(error).__name__}: {error}",
            hint="a mirror may have left something out; look at HF_ENDPOINT",
        ) from error
    except Exception as error:  # huggingface_hub lets its HTTP library's errors through, and changes that library
        if type(error).__module__.startswith("milora_init") or explain(error):
            raise
        raise _refused(model, None, error) from error


def _refused(model: str, status: int | None, error: Exception) -> HubError:
    if status == 429:
        return HubError(f"the Hub limits our rate over {model}", hint="wait a few minutes; `hf auth login` allows more")
    if status in (401, 403):
        return HubError(
            f"the Hub does not let this token at {model} (status {status})",
            hint="`hf auth login` with a token that may, or set HF_TOKEN",
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return HubError(
        f"the Hub failed over {model}: {reason}",
        hint="look at the network, then run the same command again: what was done is kept",
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, through what it was raised from."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None
