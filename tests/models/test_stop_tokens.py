"""The end tokens of a directory or a GGUF file."""

import json

import pytest

from jaxq.models import load_stop_tokens


def write(path, name, **entries):
    (path / name).write_text(json.dumps(entries))


def test_where_the_tokens_are(tmp_path):
    assert load_stop_tokens(tmp_path) == ()
    write(tmp_path, "config.json", eos_token_id=None, text_config={"eos_token_id": 9})
    assert load_stop_tokens(tmp_path) == (9,)
    write(tmp_path, "config.json", eos_token_id=2)
    assert load_stop_tokens(tmp_path) == (2,)
    write(tmp_path, "generation_config.json", eos_token_id=[3, 1])
    assert load_stop_tokens(tmp_path) == (3, 1)


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason='needs gguf: pip install -e ".[bench]"')
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_eos_token_id(5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_stop_tokens(path) == (5,)


@pytest.mark.parametrize("value", [True, -1, 2**31, "2", [1.0], {"a": 1}])
def test_other_values_are_errors_that_name_the_file(tmp_path, value):
    write(tmp_path, "config.json", eos_token_id=value)
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id is"):
        load_stop_tokens(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}', "[" * 100_000])
def test_damaged_files(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"load_stop_tokens: .*generation_config"):
        load_stop_tokens(tmp_path)
