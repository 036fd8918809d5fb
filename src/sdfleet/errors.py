"""Every error a caller can meet, drawn as one tree.

    SdfleetError
    ├── BadRequest                 the request itself is wrong; trying again will not help
    │   ├── InvalidValue           one field has a value we cannot draw
    │   ├── UnknownName            a model, sampler or schedule that does not exist here
    │   ├── UnsupportedByModel     the model named cannot do what was asked
    │   ├── BrokenPicture          an input picture that cannot be read
    │   ├── BackendNotNamed        the model is drawn by a service, and nobody has said that it may be
    │   ├── UpstreamRefused        the server of a language model does not take the request as it is
    │   └── PromptSyntax           a prompt whose brackets or weights make no sense
    ├── CheckpointError            the weights on disk cannot be used
    │   ├── CheckpointNotFound
    │   ├── BrokenCheckpoint       a file is missing, truncated or does not fit its config
    │   └── PickleRefused          a checkpoint format that can run code when it is opened
    ├── DownloadError              weights could not be got from a hub
    │   ├── TokenNeeded            the model is gated, and no token was sent
    │   ├── TokenRefused           the token is wrong or has expired
    │   ├── TokenTooNarrow         the token is good, but may not read this
    │   ├── LicenceNotAccepted     the owner wants its licence accepted first
    │   ├── RepositoryNotFound     misspelt, or private
    │   ├── RepositoryGone         the hub has taken it down
    │   ├── HubFileNotFound        the revision or a file of it is not on the hub
    │   ├── HubOffline             downloads are switched off on this machine
    │   ├── HubUnreachable         no connection, a time-out, or a fault of the hub
    │   ├── DownloadDamaged        what arrived is not what the hub had announced
    │   ├── DiskFull
    │   └── DownloadCancelled
    ├── OutOfMemory                the device has no room; the engine tries the next rung before it says so
    ├── EngineDied                 the process that owns the device ended during the job
    ├── EngineFailed               the engine met a fault while drawing one picture
    ├── ContentWithheld            the model's safety checker flagged every picture of the job
    │   └── Moderated              the service that draws refused the prompt, or what came of it
    ├── BackendError               another engine or a service did not draw
    │   ├── BackendUnavailable     the one named is not installed, not set up or not there now
    │   ├── CreditsNeeded          the service wants to be paid first
    │   └── BackendFailed          it was asked, and met a fault
    ├── JobCancelled               somebody asked for the job to stop
    ├── OutputNotWritable          the finished picture could not be saved
    ├── StorageError               the database of jobs cannot be used: not opened, too new, not writable
    ├── AccessError                who asks may not
    │   ├── NotAuthenticated       no key, or one that is not known here
    │   ├── NotAllowed             the key is good but not for this; or the page that asks is not ours
    │   └── JoinRefused            a machine may not take part in the fleet: its code, key or certificate is wrong
    ├── NotFound                   no job, picture or route of that name
    │   └── ModelNotFound          no node and no server behind it has that language or speech model
    ├── UpstreamFailed             a server of language models broke off, cannot be reached, or met a fault
    ├── NotAcceptable              a body too large, a method that is not there, a media type we do not read
    │   ├── TooLarge
    │   └── MethodNotAllowed
    ├── Conflict                   the same Idempotency-Key with another request; a job that cannot be retried
    │   ├── ConfirmationRequired   something that nobody has said yes to
    │   ├── AlreadyPulling         another process is downloading the same model
    │   └── InUse                  a job needs what is to be removed
    ├── Busy                       not now: try again after `retry_after_s`
    │   ├── QueueFull
    │   ├── RateLimited
    │   ├── HubRateLimited         the hub wants fewer requests
    │   ├── NotReady               the model is still being loaded
    │   ├── ShuttingDown
    │   └── StoreUnavailable       the database is locked, full or away; nothing was accepted
    ├── SwitchedOff                somebody who may has switched drawing off
    └── DeadlineExceeded           the job was not done by the time its caller gave it

Each class carries `code` (stable, for programs), `http_status`, and a `hint` (what to do next).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SdfleetError(Exception):
    """Something a caller can act on. `str(error)` is one line: what happened, then what to do."""

    code = "internal_error"
    http_status = 500

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def to_wire(self) -> dict[str, str]:
        """The error as plain data for another process."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class BadRequest(SdfleetError):
    """The request is wrong; the caller must change it."""

    code = "bad_request"
    http_status = 400


class InvalidValue(BadRequest):
    """One field holds a value that cannot be used."""

    code = "invalid_value"

    def __init__(self, field: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{field}: {message}", hint=hint)
        self.field = field


class UnknownName(BadRequest):
    """A name that nothing here answers to. Names the nearest ones that exist."""

    code = "unknown_name"
    http_status = 404

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        shown = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"there is no {kind} named {name[:80]!r}", hint=shown)
        self.kind = kind
        self.name = name


class UnsupportedByModel(BadRequest):
    """The checkpoint exists but cannot do this."""

    code = "unsupported_by_model"


class BrokenPicture(BadRequest):
    """An input picture that cannot be read."""

    code = "broken_picture"


class BackendNotNamed(BadRequest):
    """The model is drawn outside this machine, where a prompt goes only when somebody has said so."""

    code = "backend_not_named"

    def __init__(self, model: str, backend: str, service: str) -> None:
        super().__init__(
            f"{model} is drawn by {service}, which would be sent the prompt",
            hint=f"say that you want that: name the backend {backend!r} in the request, or set SD_DEFAULT_BACKEND",
        )
        self.field = "backend"


class UpstreamRefused(BadRequest):
    """The server of a language model does not take the request; the message is that server's own."""

    code = "upstream_refused"


class PromptSyntax(BadRequest):
    """A prompt whose brackets or weights make no sense."""

    code = "prompt_syntax"


class CheckpointError(SdfleetError):
    """The weights on disk cannot be used."""

    code = "checkpoint_error"
    http_status = 409


class CheckpointNotFound(CheckpointError):
    """Nothing is at the path given."""

    code = "checkpoint_not_found"
    http_status = 404


class BrokenCheckpoint(CheckpointError):
    """A file of the checkpoint is missing, truncated, or does not fit its config."""

    code = "broken_checkpoint"


class PickleRefused(CheckpointError):
    """A checkpoint in a format that can run code when it is opened."""

    code = "pickle_refused"

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} is a pickle, and opening a pickle can run any code it carries",
            hint="convert it to .safetensors on a machine you do not mind losing, then import that",
        )
        self.path = path


class DownloadError(SdfleetError):
    """Weights could not be got from a hub."""

    code = "download_error"
    http_status = 502


class TokenNeeded(DownloadError):
    """The model is gated or private, and no token was sent."""

    code = "hub_token_needed"
    http_status = 403


class TokenRefused(DownloadError):
    """The hub does not know the token, or not any more."""

    code = "hub_token_refused"
    http_status = 403


class TokenTooNarrow(DownloadError):
    """The hub knows the token, but it may not read this model."""

    code = "hub_token_too_narrow"
    http_status = 403


class LicenceNotAccepted(DownloadError):
    """The owner of the weights wants its licence accepted before a download."""

    code = "licence_not_accepted"
    http_status = 403


class RepositoryNotFound(DownloadError):
    """There is no such model on the hub, or it is private: a hub does not tell which."""

    code = "hub_repository_not_found"
    http_status = 404


class RepositoryGone(DownloadError):
    """The hub has taken the model down."""

    code = "hub_repository_gone"
    http_status = 410


class HubFileNotFound(DownloadError):
    """The model is on the hub, but not this revision or not the files that are needed."""

    code = "hub_file_not_found"
    http_status = 404


class HubOffline(DownloadError):
    """Downloads are switched off on this machine."""

    code = "hub_offline"
    http_status = 503


class HubUnreachable(DownloadError):
    """No connection to the hub, a time-out, or a fault of its own."""

    code = "hub_unreachable"


class DownloadDamaged(DownloadError):
    """What arrived is not what the hub had announced."""

    code = "download_damaged"


class DiskFull(DownloadError):
    """The disk has no room for the weights. What has arrived is kept for the next try."""

    code = "disk_full"
    http_status = 507


class DownloadCancelled(DownloadError):
    """Somebody stopped the download. What has arrived is kept for the next try."""

    code = "download_cancelled"
    http_status = 499


class OutOfMemory(SdfleetError):
    """The device has no room for this step.

    Raised inside the engine and caught there: the next rung of the memory ladder is tried.
    It reaches a caller only when the ladder has no rung left.
    """

    code = "out_of_memory"
    http_status = 507


class EngineDied(SdfleetError):
    """The process that owns the device ended while the job ran."""

    code = "engine_died"
    http_status = 503


class EngineFailed(SdfleetError):
    """The engine met a fault of ours or of a library while it drew one picture."""

    code = "engine_failed"


class ContentWithheld(SdfleetError):
    """Every picture was drawn, and flagged by the checkpoint's own safety checker. Another seed may pass."""

    code = "content_withheld"
    http_status = 400


class Moderated(ContentWithheld):
    """The service that draws has refused the prompt, or the picture that came of it."""

    code = "moderated"


class BackendError(SdfleetError):
    """An engine beside ours, or a service, did not draw."""

    code = "backend_error"
    http_status = 502


class BackendUnavailable(BackendError):
    """The backend that was named cannot draw as things stand. The hint says what to do about it."""

    code = "backend_unavailable"
    http_status = 503

    def __init__(self, backend: str, reason: str, *, hint: str = "see /api/backends") -> None:
        super().__init__(f"the backend {backend} cannot be used: {reason}", hint=hint)
        self.backend = backend


class CreditsNeeded(BackendError):
    """The service has no credits left on the account of this server's key."""

    code = "insufficient_credits"
    http_status = 402


class BackendFailed(BackendError):
    """It was asked, and met a fault, or gave an answer that makes no sense."""

    code = "backend_failed"


class JobCancelled(SdfleetError):
    """The job was stopped because somebody asked."""

    code = "cancelled"
    http_status = 499


class OutputNotWritable(SdfleetError):
    """The picture is finished but could not be saved."""

    code = "output_not_writable"
    http_status = 507


class StorageError(SdfleetError):
    """The database where jobs and keys are kept cannot be used until a person has done something about it."""

    code = "storage_error"


class AccessError(SdfleetError):
    """Who asks may not."""

    code = "access_denied"
    http_status = 403


class NotAuthenticated(AccessError):
    """No key came along, or one that is not known here."""

    code = "invalid_api_key"
    http_status = 401


class NotAllowed(AccessError):
    """The caller is known but may not do this."""

    code = "not_allowed"


class JoinRefused(AccessError):
    """A machine may not take part in the fleet, or the one it was led to is not the router it was to join."""

    code = "join_refused"


class NotFound(SdfleetError):
    """No job, picture or route of that name, or none that this caller may see."""

    code = "not_found"
    http_status = 404


class ModelNotFound(NotFound):
    """No node has a language or speech model of that name."""

    code = "model_not_found"


class UpstreamFailed(SdfleetError):
    """A server of language models cannot be reached, met a fault, or broke off in the middle of its answer."""

    code = "upstream_failed"
    http_status = 502


class NotAcceptable(SdfleetError):
    """A request that is refused before it is read."""

    code = "not_acceptable"
    http_status = 400


class TooLarge(NotAcceptable):
    """A body, a file or a picture above a limit."""

    code = "too_large"
    http_status = 413


class MethodNotAllowed(NotAcceptable):
    """The route exists, but not with this method."""

    code = "method_not_allowed"
    http_status = 405


class Conflict(SdfleetError):
    """The request does not fit what is already here."""

    code = "conflict"
    http_status = 409


class ConfirmationRequired(Conflict):
    """Nobody has said yes to this yet, or only to something else."""

    code = "confirmation_required"


class AlreadyPulling(Conflict):
    """Another process is downloading the same model."""

    code = "already_pulling"


class InUse(Conflict):
    """A job needs what is to be removed."""

    code = "in_use"


def in_use(model: str, n_jobs: int) -> InUse:
    """The refusal to take a checkpoint away from jobs that draw with it."""
    return InUse(
        f"{model} is being drawn with by {n_jobs} job{'' if n_jobs == 1 else 's'}",
        hint="wait until they have ended, or cancel them: sdfleet jobs cancel ID",
    )


class Busy(SdfleetError):
    """Not now. `retry_after_s` says when to try again."""

    code = "busy"
    http_status = 503

    def __init__(self, message: str, *, retry_after_s: float = 1.0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class QueueFull(Busy):
    """As many jobs wait as may."""

    code = "queue_full"
    http_status = 429


class RateLimited(Busy):
    """This key asks more often than it may."""

    code = "rate_limit_exceeded"
    http_status = 429


class HubRateLimited(Busy):
    """The hub wants fewer requests."""

    code = "hub_rate_limited"


class NotReady(Busy):
    """The model is still being loaded."""

    code = "not_ready"


class ShuttingDown(Busy):
    """The server is stopping; what it has accepted goes on after its next start."""

    code = "shutting_down"


class StoreUnavailable(Busy):
    """The database cannot be read or written now. What it had accepted before is not lost."""

    code = "store_unavailable"


class SwitchedOff(SdfleetError):
    """Somebody who may manage this server has switched it off. Waiting does not help, a person must."""

    code = "switched_off"
    http_status = 503


class DeadlineExceeded(SdfleetError):
    """The job was not done by the time its caller gave it."""

    code = "deadline_exceeded"
    http_status = 504


def _subclasses(cls: type[SdfleetError]) -> Iterable[type[SdfleetError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


def from_wire(wire: dict[str, str]) -> SdfleetError:
    """The error that another process sent, as the same class, so that `except OutOfMemory` works across processes."""
    by_code = {cls.code: cls for cls in _subclasses(SdfleetError)}
    cls = by_code.get(wire["code"], SdfleetError)
    error = cls.__new__(cls)
    SdfleetError.__init__(error, wire["message"], hint=wire["hint"])
    if isinstance(error, Busy):
        error.retry_after_s = 1.0
    return error
