"""Videos for VBench: its list of prompts, its file names, and going on after an interruption."""

import json

import pytest

from qat_patch import export_checkpoint, patch_model
from scripts import sample_prompts
from support.models.tiny_wan import tiny_pipeline

SIZE = ["--height=16", "--width=16", "--num-frames=5", "--steps=2", "--guidance-scale=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    pipe = tiny_pipeline(layers=1)
    patch_model(pipe)
    export_checkpoint(pipe, folder / "export")
    entries = [
        {"prompt_en": "a red square", "dimension": ["color", "motion"]},
        {"prompt_en": "a red square", "dimension": ["scene"]},
        {"prompt_en": "a blue square moves left/right", "dimension": ["motion"]},
    ]
    (folder / "VBench_full_info.json").write_text(json.dumps(entries))
    (folder / "prompts.txt").write_text("a red square\n\na green square\n")
    return folder


def sample(folder, output, *arguments, prompts="VBench_full_info.json"):
    return sample_prompts.main([str(folder / "export"), f"--prompts={folder / prompts}", f"--output={output}", *SIZE, *arguments])


def test_every_prompt_gets_its_samples_and_existing_files_are_kept(folder, tmp_path, capsys):
    files = sample(folder, tmp_path / "fp4", "--samples=2", "--device=cpu")
    prompts = ["a red square", "a blue square moves left_right"]
    assert [file.name for file in files] == [f"{prompt}-{number}.mp4" for prompt in prompts for number in range(2)]
    assert sorted(tmp_path.joinpath("fp4").iterdir()) == sorted(files)
    content = {file: file.read_bytes() for file in files}
    assert content[files[0]] != content[files[1]]
    files[2].unlink()
    (tmp_path / "fp4" / f".{files[2].name}.partial.mp4").write_text("as an interrupted run leaves it")
    sample(folder, tmp_path / "fp4", "--samples=2", "--device=cpu")
    assert "2 prompts, 1 of 4 videos to make" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in files} == content
    original = sample(folder, tmp_path / "original", "--samples=1", "--attention=original", "--device=cpu")
    assert [file.name for file in original] == [f"{prompt}-0.mp4" for prompt in prompts]


def test_lists(folder):
    read = sample_prompts.read_prompts
    assert read(folder / "VBench_full_info.json", "scene") == ["a red square"]
    assert read(folder / "prompts.txt", None) == ["a red square", "a green square"]


@pytest.mark.parametrize(
    ("content", "dimension", "message"),
    [
        (None, None, "there is no .*from the repository Vchitect/VBench"),
        ("[]", None, "there are none in"),
        ("[1]", None, "expected VBench's list"),
        ("{", None, "expected VBench's list"),
        ('[{"prompt_en": "x", "dimension": ["a"]}]', "b", "--dimension: expected one of a, got 'b'"),
    ],
)
def test_mistakes(tmp_path, content, dimension, message):
    if content is not None:
        (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        sample_prompts.read_prompts(tmp_path / "list.json", dimension)


def test_prompts_that_would_overwrite_each_other(folder, tmp_path):
    (folder / "same.txt").write_text("a/b\na_b\n")
    with pytest.raises(ValueError, match="1 prompts would have the same file, 'a_b' for one"):
        sample(folder, tmp_path / "out", prompts="same.txt")
