"""The pieces of a text, against the text that was encoded."""

import pytest

import jaxq
from jaxq.cli._text_stream import TextStream
from tests.cli.conftest import EXAMPLES

NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
# The tokenizer has no token for most of these characters, so they are several tokens.
TEXT = " na\u00efve \u4e2d\u6587 \U0001f642\U0001f44d and then  the end.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return jaxq.models._checkpoint._load_tokenizer(
        EXAMPLES / "tiny_llama" / "tokenizer.json"
    )


def pieces_of(tokenizer, tokens, stops=()):
    prompt = tokenizer.encode("def f(").ids
    stream = TextStream(tokenizer, prompt, stops)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.has_ended:
            break
    return [*pieces, stream.rest()]


def test_pieces_are_whole_characters_and_make_the_text(tokenizer):
    tokens = tokenizer.encode(TEXT).ids
    pieces = pieces_of(tokenizer, tokens)
    assert pieces.count("") > 3  # parts of characters
    assert "".join(pieces) == TEXT
    assert not any(NO_CHARACTER in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing waited for the end


def test_a_character_that_is_not_complete(tokenizer):
    tokens = tokenizer.encode("a\U0001f642").ids[:-1]
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces[:-1]) == "a"
    assert set(pieces[-1]) == {NO_CHARACTER}


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["then"], " na\u00efve \u4e2d\u6587 \U0001f642\U0001f44d and "),
        # The first place counts, and not the first text of the list.
        (["the end", "and th"], " na\u00efve \u4e2d\u6587 \U0001f642\U0001f44d "),
        ([" na"], ""),
        (["\u6587"], " na\u00efve \u4e2d"),
        # The text begins like these, and goes on in another way.
        (["the ending", "end.\n\n", "\U0001f642 "], TEXT),
        ([""], TEXT),
    ],
)
def test_a_text_ends_before_a_stop_text(tokenizer, stops, expected):
    pieces = pieces_of(tokenizer, tokenizer.encode(TEXT).ids, stops)
    assert "".join(pieces) == expected


def test_the_first_space_after_a_prompt_is_kept():
    # Decoders of the sentencepiece kind drop the space of the first token.
    tokenizers = pytest.importorskip("tokenizers")
    words = {"\u2581one": 0, "\u2581two": 1, "s": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="s"))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    stream = TextStream(tokenizer, [0], [])
    assert [stream.add(token) for token in (1, 2, 0)] == [" two", "s", " one"]
