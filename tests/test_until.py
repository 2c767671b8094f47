"""Strings that end an answer, however the tokens cut them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ppexport
from ppexport.runtime.answer import Speech


class Pieces:
    """A text whose token n is a given string."""

    def __init__(self, pieces: Sequence[str]):
        self.pieces = pieces

    def stream(self) -> Pieces:
        return self

    def push(self, token: int) -> str:
        return self.pieces[token]

    def finish(self) -> str:
        return ""


def said(pieces: Sequence[str], until: Sequence[str]) -> tuple[str, bool]:
    text: Any = Pieces(pieces)
    speech = Speech(text, frozenset(), until)
    found = []
    for token in range(len(pieces)):
        found.append(speech.push(token))
        if speech.ended:
            break
    found.append(speech.finish())
    return "".join(found), speech.ended


def cuts(text: str) -> Iterator[list[str]]:
    """Every way to cut a text into pieces."""
    for where in itertools.product((False, True), repeat=max(len(text) - 1, 0)):
        pieces = [text[:1]]
        for cut, character in zip(where, text[1:], strict=True):
            if cut:
                pieces.append(character)
            else:
                pieces[-1] += character
        yield pieces


@given(text=st.text("abc", max_size=7), until=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_the_first_of_them_ends_it_however_it_is_cut(text: str, until: list[str]) -> None:
    places = [text.find(end) for end in until if end in text]
    expected = (text[: min(places)], True) if places else (text, False)
    for pieces in cuts(text):
        assert said(pieces, until) == expected


def test_text_is_held_back_no_longer_than_needed() -> None:
    text: Any = Pieces(["a\n", "b", "\n\n", "c"])
    speech = Speech(text, frozenset(), ["\n\n"])
    assert [speech.push(token) for token in range(3)] == ["a", "\nb", ""]
    assert speech.ended


@pytest.mark.parametrize("until", ["end", [""], [3], None])
def test_bad_values(until: Any) -> None:
    with pytest.raises(
        ppexport.RequestError, match="until is .*expected a list of strings that are not empty"
    ):
        ppexport.Request("hi", until=until)
