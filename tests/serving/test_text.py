"""The text of an answer: whole characters, and nothing of a stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_paged_integrations.serving.openai.text import AnswerText
from support.served import tokenizer

WORDS = st.lists(st.sampled_from(["a", "b", "ab", "é", "☃", "🙂", " the", "\n"]), max_size=12).map("".join)


def pieces(text: str, stops: list[str]) -> tuple[list[str], AnswerText]:
    """The pieces that are sent for a text, token by token."""
    answer, sent = AnswerText(tokenizer().backend_tokenizer, stops), []
    for token in tokenizer()(text)["input_ids"]:
        sent.append(answer.add(token))
        if answer.is_stopped:
            break
    return [*sent, answer.end()], answer


def test_a_character_is_sent_when_it_is_whole():
    sent, _ = pieces("a☃🙂", [])
    assert len(sent) == 1 + 3 + 4 + 1  # Its bytes are tokens.
    assert [piece for piece in sent if piece] == ["a", "☃", "🙂"]


def test_a_character_that_is_never_whole_is_a_replacement_character():
    answer = AnswerText(tokenizer().backend_tokenizer)
    tokens = tokenizer()("a🙂")["input_ids"]
    assert [answer.add(token) for token in tokens[:-1]] == ["a", "", "", ""]
    assert answer.end() == "\ufffd"


@given(WORDS, st.lists(st.sampled_from(["ab", "aab", "b🙂", "\n\n", "e a"]), max_size=3))
def test_what_is_sent_is_the_text_up_to_a_stop(text, stops):
    sent, answer = pieces(text, stops)
    together = "".join(sent)
    assert all(stop not in together for stop in stops)
    if answer.is_stopped:
        assert answer.length == len(together)
        assert text.startswith(together) and any(text[len(together) :].startswith(stop) for stop in stops)
    else:
        assert together == text and not any(stop in text for stop in stops)


@pytest.mark.parametrize("stops, length", [(["lue too"], 11), (["ue", "lue too"], 12), (["x", "why"], None)])
def test_a_stop_text_goes_over_the_ends_of_tokens(stops, length):
    text = "the sky is blue too"
    sent, answer = pieces(text, stops)
    assert "".join(sent) == (text if length is None else text[: text.index(stops[0])])
    assert answer.is_stopped == (length is not None)
