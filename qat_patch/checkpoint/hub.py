"""Upload an export to the Hub."""

from __future__ import annotations

from pathlib import Path

from .trust.opening import opened


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    exist_ok: bool = False,
    token: str | None = None,
    commit_message: str = "Upload a checkpoint for 4-bit attention",
) -> str:
    """Upload an export in one commit: the files that its manifest lists, the manifest and README.md. The folder is only read.

    Args:
        folder: what `export_checkpoint` wrote.
        repo_id: `name` or `organization/name`; created if it does not exist.
        private: whether a new repository is private; default: the account's setting.
        exist_ok: upload into an existing repository; use it to continue a failed upload, too.
        token: access token with write permission; default: that of `hf auth login`.
        commit_message: the message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the folder is not an export, there is no login, or the name is taken. Then nothing was uploaded.
        RuntimeError: the Hub refused or the connection broke; the message says how to continue.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    with opened(folder) as export:
        api = HfApi(token=token)
        try:
            api.whoami()
        except LocalTokenNotFoundError as error:
            raise ValueError("push_to_hub: no access token; run `hf auth login`, or pass token=...") from error
        except HfHubHTTPError as error:
            raise ValueError(f"push_to_hub: the Hub does not accept the access token ({error}); run `hf auth login`") from error
        if not exist_ok and api.repo_exists(repo_id):
            raise ValueError(
                f"push_to_hub: the repository {repo_id} exists; choose another name, or pass exist_ok=True to add a commit to it"
            )
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            # The private copy: what the manifest lists, the manifest and the model card, and nothing else.
            return api.upload_folder(repo_id=repo_id, folder_path=export.folder, commit_message=commit_message).commit_url
        except Exception as error:
            raise RuntimeError(
                f"push_to_hub: uploading {folder} to {repo_id} failed: {error}\nThe export is complete on disk. To go on: "
                f"push_to_hub({str(folder)!r}, {repo_id!r}, exist_ok=True); what has arrived is not sent again."
            ) from error
