"""A directory is complete, or it is as before."""

import os
from pathlib import Path

import click
import pytest

from jaxq.cli._new_output import check_output, new_directory


def test_a_new_directory_takes_its_place_at_the_end(tmp_path):
    out = tmp_path / "out"
    with new_directory(out) as folder:
        (folder / "a").write_text("new")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "a").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_directory_is_as_before(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b").write_text("old")
    with pytest.raises(error), new_directory(out) as folder:
        raise_after_a_file(folder, error)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["b"]
    with new_directory(out) as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["a"]


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("is_done", [False, True])
def test_ctrl_c_while_the_new_directory_takes_its_place(
    tmp_path, monkeypatch, place, is_done
):
    out, calls, replace = tmp_path / "out", [], os.replace
    out.mkdir()
    (out / "b").write_text("old")

    def interrupted(*paths):
        calls.append(paths)
        if is_done or len(calls) != place:
            replace(*paths)
        if len(calls) == place:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt), new_directory(out) as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    is_new = place == 2 and is_done
    assert [path.name for path in out.iterdir()] == ["a" if is_new else "b"]


def test_outputs_that_cannot_be_written(tmp_path):
    check_output(tmp_path / "new", overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(click.UsageError, match="not a directory"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(click.UsageError, match="there is no directory"):
        check_output(tmp_path / "none" / "new", overwrite=True)
    with pytest.raises(click.UsageError, match="Pass --overwrite"):
        check_output(tmp_path, overwrite=False)
    (tmp_path / "file").unlink()
    for name in ("config.json", "model-00001-of-00002.safetensors", "vocab.txt"):
        (tmp_path / name).touch()
    check_output(tmp_path, overwrite=True)
    with pytest.raises(click.UsageError, match="this path has no name"):
        check_output(Path("."), overwrite=True)


@pytest.mark.parametrize(
    "name", ["notes.txt", "stats.safetensors", "float/config.json"]
)
def test_overwrite_deletes_no_files_of_others(tmp_path, name):
    (tmp_path / "config.json").touch()
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.touch()
    match = f"would delete {name.split('/')[0]}, which does not belong to a model"
    with pytest.raises(click.UsageError, match=match):
        check_output(tmp_path, overwrite=True)
    assert other.exists()


def test_gguf_is_a_file(tmp_path):
    check_output(tmp_path / "a.gguf", overwrite=False, format="gguf")
    (tmp_path / "a.gguf").touch()
    check_output(tmp_path / "a.gguf", overwrite=True, format="gguf")
    with pytest.raises(click.UsageError, match="the file exists"):
        check_output(tmp_path / "a.gguf", overwrite=False, format="gguf")
    with pytest.raises(click.UsageError, match=r"must end in \.gguf"):
        check_output(tmp_path / "a", overwrite=False, format="gguf")
    (tmp_path / "b.gguf").mkdir()
    with pytest.raises(click.UsageError, match="this is a directory"):
        check_output(tmp_path / "b.gguf", overwrite=True, format="gguf")


def raise_after_a_file(folder, error):
    (folder / "a").write_text("new")
    raise error
