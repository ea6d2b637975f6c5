"""push_to_hub against a Hub that is a folder."""

import shutil
from types import SimpleNamespace
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from qat_patch import export_checkpoint, patch_model, push_to_hub
from support.models.tiny_qwen3 import tiny_qwen3


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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = type("Hub", (FakeHub,), {"root": tmp_path / "hub", "token": "good"})
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture
def folder(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    return export_checkpoint(model, tmp_path / "export")


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_upload(hub, folder):
    assert push_to_hub(folder, "me/model") == "hub/me/model/commit/1"
    assert contents(hub.root / "me/model") == contents(folder)


def test_nobody_is_logged_in(hub, folder):
    hub.token = None
    with pytest.raises(ValueError, match="no access token; run `hf auth login`"):
        push_to_hub(folder, "me/model")
    with pytest.raises(ValueError, match="does not accept the access token"):
        push_to_hub(folder, "me/model", token="bad")
    assert not hub.root.exists()
    push_to_hub(folder, "me/model", token="good")


def test_the_name_is_taken(hub, folder):
    (hub.root / "me/model").mkdir(parents=True)
    with pytest.raises(ValueError, match="me/model exists; choose another name, or pass exist_ok=True"):
        push_to_hub(folder, "me/model")
    assert not contents(hub.root / "me/model")
    push_to_hub(folder, "me/model", exist_ok=True)
    assert contents(hub.root / "me/model") == contents(folder)


def test_a_failure_half_way_says_how_to_go_on(hub, folder):
    before = contents(folder)
    hub.broken_after = 2
    with pytest.raises(RuntimeError, match="the connection broke") as failure:
        push_to_hub(folder, "model")
    assert contents(folder) == before
    call = f"push_to_hub({str(folder)!r}, 'me/model', exist_ok=True)"
    assert call in str(failure.value)
    hub.broken_after = None
    eval(call)
    assert contents(hub.root / "me/model") == before


def test_only_exports_are_uploaded(hub, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"qat_patch.json does not exist"):
        push_to_hub(tmp_path / "other", "me/model")
    assert not hub.root.exists()
