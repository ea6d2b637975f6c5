"""push_to_hub, and exports by their names on the Hub, against a Hub that is a folder."""

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from qat_patch import export_checkpoint, load_checkpoint, patch_model, push_to_hub, verify_checkpoint
from qat_patch.cli import main
from support.models.exports import add_lora
from support.models.tiny_qwen3 import tiny_qwen3
from support.runs.fake_hub import FakeHub
from support.runs.runs import reseal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def test_upload_without_a_login(hub, folder):
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


def test_a_failure_half_way_says_how_to_continue(hub, folder):
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


def test_what_is_no_part_of_the_export_is_not_uploaded(hub, folder):
    expected = contents(folder)
    (folder / "losses.png").write_text("for people, and not exported")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("a token")
    push_to_hub(folder, "me/model")
    assert contents(hub.root / "me/model") == expected
    (folder / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="notes.txt, which is a link"):
        push_to_hub(folder, "me/other")
    assert not (hub.root / "me/other").exists()


@pytest.fixture
def downloads(monkeypatch, tmp_path, folder):
    """Lets snapshot_download find the export as `me/model`, in a cache like the Hub client's; the calls, as they come."""
    calls = []
    cache = tmp_path / "cache" / "models--me--model"
    snapshot = cache / "snapshots" / COMMIT
    other = {"pytorch_model.bin": b"never asked for"}

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((revision, list(allow_patterns)))
        if name != "me/model" or revision not in (None, "v1", COMMIT):
            raise HfHubHTTPError("404 Not Found", response=MagicMock())
        for file, content in (contents(folder) | other).items():
            if any(fnmatch(file, pattern) for pattern in allow_patterns) and not (snapshot / file).exists():
                blob = cache / "blobs" / hashlib.sha256(content).hexdigest()
                for path in (blob.parent, snapshot):
                    path.mkdir(parents=True, exist_ok=True)
                blob.write_bytes(content)
                (snapshot / file).symlink_to(f"../../blobs/{blob.name}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_an_export_by_its_name(downloads, folder, capsys):
    expected = load_checkpoint(folder).state_dict()
    for revision in (None, "v1"):
        downloads.clear()
        model = load_checkpoint("me/model", revision=revision)
        assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
        assert model.config._name_or_path == "me/model"
        # The manifest first, then what it lists, of the commit that it is from.
        files = sorted(name for name in contents(folder) if name != "README.md")
        assert [revision for revision, _ in downloads] == [revision, COMMIT]
        assert downloads[0][1] == ["qat_patch.json"] and sorted(downloads[1][1]) == files
    assert sum("bit-equal" in line for line in verify_checkpoint("me/model", revision="v1")) == 2
    assert main(["verify", "me/model", "--revision", "v1"]) == 0
    assert capsys.readouterr().out.startswith("me/model: model, written by")
    with pytest.raises(ValueError, match="me/model is not a local folder and cannot be downloaded .* .revision v2.: 404"):
        load_checkpoint("me/model", revision="v2")
    with pytest.raises(ValueError, match="revision: has no effect for the folder"):
        load_checkpoint(folder, revision="v1")


def test_only_the_caches_own_links_are_followed(downloads, tmp_path):
    snapshot = Path(huggingface_hub.snapshot_download("me/model", revision=None, allow_patterns=["*.json", "*.safetensors"]))
    load_checkpoint(snapshot)
    content = (snapshot / "config.json").read_bytes()
    for target in (tmp_path / "config.json", snapshot.parents[1] / "config.json"):
        target.write_bytes(content)
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        with pytest.raises(ValueError, match="config.json, which is a link"):
            load_checkpoint(snapshot)


def test_adapters_of_a_base_on_the_hub(monkeypatch, tmp_path):
    base = tiny_qwen3(num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"never read")
    model = add_lora(base)
    patch_model(model)
    folder = export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    reseal(folder, base_model="me/base")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update({name: options}) or tmp_path / "base"
    )
    loaded = load_checkpoint(folder).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())
    assert asked["me/base"]["allow_patterns"][0] == "config.json"
    assert not any(fnmatch(name, pattern) for name in ("x.py", "x.bin") for pattern in asked["me/base"]["allow_patterns"])
