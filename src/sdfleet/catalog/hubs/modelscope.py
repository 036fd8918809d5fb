"""ModelScope through its light client library (`modelscope_hub`; the big one would import torch)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdfleet.catalog.hubs.hub import (
    CHUNK_BYTES,
    DEFAULT_RETRY_S,
    Access,
    Digest,
    HubFile,
    Listing,
    Source,
    Transfer,
    rate_limited,
    retry_after_s,
    token_needed,
    unreachable,
)
from sdfleet.errors import (
    HubFileNotFound,
    LicenceNotAccepted,
    RepositoryNotFound,
    SdfleetError,
    TokenRefused,
)

OFFICIAL = "https://modelscope.cn"
# The same hub for the rest of the world.
INTERNATIONAL = "https://www.modelscope.ai"
_REVISION = "master"


class ModelScope:
    """ModelScope or a mirror of it. notes_folder: where its library may keep a session number."""

    source: Source = "modelscope"

    def __init__(self, access: Access, *, notes_folder: Path) -> None:
        self._access = access
        self.endpoint = access.endpoint
        self._notes_folder = notes_folder

    def listing(self, repo_id: str) -> Listing:
        with self._translating(repo_id):
            entries = self._api().list_repo_files(repo_id, "model", revision=_REVISION)
            files = tuple(_file(entry) for entry in entries if entry.type != "tree" and entry.sha256)
            return Listing(revision=_REVISION, files=files)

    def check_access(self, repo_id: str, listing: Listing) -> None:
        """Nothing: whoever may list a model here may have it, as far as its library tells."""

    @contextmanager
    def open(self, repo_id: str, listing: Listing, path: str, *, start: int) -> Iterator[Transfer]:
        with self._translating(repo_id, path=path):
            headers = {"Accept-Encoding": "identity"}
            if start:
                headers["Range"] = f"bytes={start}-"
            response = self._api().legacy.download_stream(repo_id, "model", path, listing.revision, headers=headers)
            with response:
                begins = start if response.status_code == 206 else 0
                yield Transfer(begins, response.iter_content(CHUNK_BYTES))

    def _api(self) -> Any:
        from modelscope_hub import HubApi
        from modelscope_hub.config import HubConfig

        # It writes to stderr by itself; what a person should know comes as an error from here.
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        # An empty token, and not None, which would send a stored login to whatever the endpoint is.
        folder = self._notes_folder
        config = HubConfig(
            endpoint=self.endpoint, token=self._access.sent_token or "", config_dir=folder, cache_dir=folder
        )
        return HubApi(config)

    @contextmanager
    def _translating(self, repo_id: str, *, path: str = "") -> Iterator[None]:
        import requests
        from modelscope_hub import errors

        try:
            yield
        except errors.AuthenticationError as exc:
            raise self._unknown_caller(repo_id) from exc
        except errors.PermissionDeniedError as exc:
            raise self._forbidden(repo_id) from exc
        except errors.NotExistError as exc:
            if path:
                raise HubFileNotFound(
                    f"{path} is not in {repo_id} on ModelScope", hint="try again: the model may have just changed"
                ) from exc
            raise RepositoryNotFound(
                f"there is no model {repo_id} on ModelScope that this account can see",
                hint="check the name; a private model needs a token of an account that may see it",
            ) from exc
        except errors.RateLimitError as exc:
            raise rate_limited(self.source, float(exc.retry_after or DEFAULT_RETRY_S)) from exc
        except errors.APIError as exc:
            raise self._refused(exc) from exc
        except (errors.HubError, requests.RequestException) as exc:
            raise unreachable(self.source, self.endpoint, str(exc) or type(exc).__name__) from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise unreachable(self.source, self.endpoint, "its answer makes no sense") from exc

    def _refused(self, exc: Any) -> SdfleetError:
        status = exc.status_code
        if status == 429:
            return rate_limited(self.source, retry_after_s({}))
        return unreachable(self.source, self.endpoint, f"it answered with status {status}")

    def _unknown_caller(self, repo_id: str) -> SdfleetError:
        if self._access.sent_token is None:
            return self._token_needed(repo_id)
        return TokenRefused(
            "ModelScope does not know the token: it is wrong, revoked or expired",
            hint="make a new one at https://modelscope.cn/my/myaccesstoken and set MODELSCOPE_API_TOKEN to it",
        )

    def _forbidden(self, repo_id: str) -> SdfleetError:
        """A missing, a private and a gated model look alike here; without a token nobody can tell which it is."""
        if self._access.sent_token is None:
            return self._token_needed(repo_id)
        return LicenceNotAccepted(
            f"this account may not have {repo_id}: its licence is not accepted, or it is private",
            hint=f"see {OFFICIAL}/models/{repo_id} and accept the licence there, then try again",
        )

    def _token_needed(self, repo_id: str) -> SdfleetError:
        return token_needed(
            f"ModelScope does not give {repo_id} without a token: it is gated, private or misspelt",
            self._access,
            hint="check the name; make a token at https://modelscope.cn/my/myaccesstoken, set MODELSCOPE_API_TOKEN",
        )


def _file(entry: Any) -> HubFile:
    return HubFile(path=entry.path, n_bytes=int(entry.size), digest=Digest("sha256", str(entry.sha256).lower()))
