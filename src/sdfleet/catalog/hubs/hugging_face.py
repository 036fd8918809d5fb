"""Hugging Face through its own client library. Its causes of refusal look alike; here they are told apart, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sdfleet import __version__
from sdfleet.catalog.hubs.hub import (
    CHUNK_BYTES,
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
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
    HubOffline,
    LicenceNotAccepted,
    RepositoryGone,
    RepositoryNotFound,
    SdfleetError,
    TokenRefused,
    TokenTooNarrow,
)

OFFICIAL = "https://huggingface.co"


class HuggingFace:
    """Hugging Face or a mirror of it. Where no token is set, the login of the `hf` command goes to the official one."""

    source: Source = "hf"

    def __init__(self, access: Access) -> None:
        self._access = access
        self.endpoint = access.endpoint

    def listing(self, repo_id: str) -> Listing:
        from huggingface_hub import HfApi

        with self._translating(repo_id):
            # `False` and not `None`, which would send a stored login to whatever the endpoint is.
            api = HfApi(endpoint=self.endpoint, token=self._token() or False, library_name="sdfleet")
            info = api.model_info(repo_id, files_metadata=True, timeout=READ_TIMEOUT_S)
            files = tuple(_file(sibling) for sibling in info.siblings or ())
            return Listing(revision=str(info.sha), files=files, is_gated=bool(info.gated))

    def check_access(self, repo_id: str, listing: Listing) -> None:
        from huggingface_hub import HfApi

        if not listing.is_gated:
            return
        with self._translating(repo_id):
            HfApi(endpoint=self.endpoint, token=self._token() or False).auth_check(repo_id)

    @contextmanager
    def open(self, repo_id: str, listing: Listing, path: str, *, start: int) -> Iterator[Transfer]:
        import httpx2
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status

        with self._translating(repo_id, path=path):
            url = hf_hub_url(repo_id, path, revision=listing.revision, endpoint=self.endpoint)
            headers = {"Accept-Encoding": "identity", "User-Agent": f"sdfleet/{__version__}"}
            if token := self._token():
                headers["Authorization"] = f"Bearer {token}"
            if start:
                headers["Range"] = f"bytes={start}-"
            timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
            # Redirected to another host, the client leaves the token behind; tests/catalog/test_hugging_face.py.
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                if response.status_code >= 400:
                    response.read()
                    hf_raise_for_status(response)
                begins = start if response.status_code == 206 else 0
                yield Transfer(begins, response.iter_bytes(CHUNK_BYTES))

    def _token(self) -> str | None:
        if self._access.token is None and self.endpoint == OFFICIAL:
            from huggingface_hub import get_token

            return get_token()
        return self._access.sent_token

    @contextmanager
    def _translating(self, repo_id: str, *, path: str = "") -> Iterator[None]:
        """Turn the library's errors into ours. The order is the meaning: a gated model is a missing one to them."""
        import httpx2
        from huggingface_hub import errors

        try:
            yield
        except errors.GatedRepoError as exc:
            raise self._gated(repo_id, exc.response.status_code) from exc
        except errors.DisabledRepoError as exc:
            raise RepositoryGone(
                f"Hugging Face has taken down {repo_id}", hint="see whether ModelScope has it: --from modelscope"
            ) from exc
        except errors.RepositoryNotFoundError as exc:
            raise self._missing(repo_id) from exc
        except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as exc:
            what = path or "the revision asked for"
            raise HubFileNotFound(
                f"{what} is not in {repo_id} on Hugging Face", hint="try again: the repository may have just changed"
            ) from exc
        except errors.OfflineModeIsEnabled as exc:
            raise HubOffline(
                "HF_HUB_OFFLINE is set: nothing may be downloaded here",
                hint="unset it, or copy the folder from another machine and use `sdfleet models import`",
            ) from exc
        except errors.HfHubHTTPError as exc:
            raise self._refused(repo_id, exc.response) from exc
        except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
            raise unreachable(self.source, self.endpoint, str(exc) or type(exc).__name__) from exc
        except errors.HFValidationError as exc:
            raise self._missing(repo_id) from exc
        except (ValueError, KeyError, TypeError) as exc:
            # A login page of a hotel, or a mirror that answers otherwise than Hugging Face.
            raise unreachable(self.source, self.endpoint, "its answer makes no sense") from exc

    def _page(self, repo_id: str) -> str:
        return f"{OFFICIAL}/{repo_id}"

    def _gated(self, repo_id: str, status: int) -> SdfleetError:
        page = self._page(repo_id)
        if status == 401 and self._token() is None:
            return self._token_needed(repo_id, f"{repo_id} is given only to accounts that accepted its licence")
        if status == 401:
            return self._wrong_token()
        return LicenceNotAccepted(
            f"this account has not accepted the licence of {repo_id}, or its owner has not answered yet",
            hint=f"accept it at {page}, then run `sdfleet models pull {repo_id}` again",
        )

    def _missing(self, repo_id: str) -> SdfleetError:
        if self._access.token is not None and not self._access.sends_token:
            return self._token_needed(repo_id, f"{repo_id} is private or misspelt")
        return RepositoryNotFound(
            f"there is no model {repo_id} on Hugging Face that this account can see",
            hint="check the name; a private model needs a token of an account that may see it",
        )

    def _refused(self, repo_id: str, response: Any) -> SdfleetError:
        status: int = response.status_code
        if status == 401:
            if self._token() is None:
                # What the real one answers for missing and private models alike.
                return self._missing(repo_id)
            return self._wrong_token()
        if status == 403 and self._token() is not None:
            return TokenTooNarrow(
                f"the Hugging Face token may not read {repo_id}",
                hint="edit it at https://huggingface.co/settings/tokens: it needs read access to public gated models",
            )
        if status == 403:
            return self._token_needed(repo_id, f"Hugging Face does not give {repo_id} to callers without a token")
        if status == 429:
            return rate_limited(self.source, retry_after_s(response.headers))
        return unreachable(self.source, self.endpoint, f"it answered with status {status}")

    def _token_needed(self, repo_id: str, message: str) -> SdfleetError:
        return token_needed(
            message,
            self._access,
            hint=f"make a token at https://huggingface.co/settings/tokens, set HF_TOKEN, accept the licence at "
            f"{self._page(repo_id)}",
        )

    def _wrong_token(self) -> SdfleetError:
        return TokenRefused(
            "Hugging Face does not know the token: it is wrong, revoked or expired",
            hint="make a new one at https://huggingface.co/settings/tokens and set HF_TOKEN to it",
        )


def _file(sibling: Any) -> HubFile:
    if sibling.lfs is None:
        return HubFile(path=sibling.rfilename, n_bytes=int(sibling.size), digest=Digest("git", str(sibling.blob_id)))
    digest = Digest("sha256", str(sibling.lfs.sha256))
    return HubFile(path=sibling.rfilename, n_bytes=int(sibling.lfs.size), digest=digest)
