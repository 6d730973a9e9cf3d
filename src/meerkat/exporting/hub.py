"""Upload of an exported folder to a hub, by huggingface_hub's own calls."""

from __future__ import annotations

from pathlib import Path

from meerkat.errors import RunError
from meerkat.exporting.folder import written_files

__all__ = ["push_folder"]


def push_folder(folder: Path, repository: str, public: bool = False) -> str:
    """Upload what an export wrote to a repository, made if there is none; the address.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` keeps; HF_ENDPOINT names
    another hub.

    Args:
        repository: `OWNER/NAME`, or a name alone for the owner of the token.
        public: Make a new repository public; one that is there stays what it is.

    Raises:
        RunError: The folder is no export, or the hub refuses or cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files = written_files(folder)
    hub = HfApi()
    try:
        made = hub.create_repo(repository, private=not public, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Upload by meerkat push",
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or _line(error)
        hint = "; HF_TOKEN, or `hf auth login`, gives a token" if status in (401, 403) else ""
        raise RunError(f"push to {repository}: the hub says {status}: {said}{hint}") from None
    except (HTTPError, OSError, ValueError) as error:
        raise RunError(f"push to {repository}: {_line(error)}") from None
    return str(made)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
