"""A Hub that is a folder."""

import shutil
from types import SimpleNamespace
from unittest.mock import MagicMock

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError


class FakeHub:
    """What push_to_hub uses of HfApi. `token` is the account's; repositories are folders."""

    root = token = None
    broken_after = None

    def __init__(self, token=None):
        self.given = token or type(self).token

    def whoami(self):
        if self.given is None:
            raise LocalTokenNotFoundError("Token is required")
        if self.given != "good":
            raise HfHubHTTPError("401 Unauthorized", response=MagicMock())
        return {"name": "me"}

    def repo_exists(self, repo_id):
        return (self.root / repo_id).exists()

    def create_repo(self, repo_id, private=None, exist_ok=False):
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id, folder_path, commit_message):
        for number, file in enumerate(sorted(folder_path.iterdir())):
            if self.broken_after is not None and number >= self.broken_after:
                raise ConnectionError("the connection broke")
            shutil.copy(file, self.root / repo_id)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")
