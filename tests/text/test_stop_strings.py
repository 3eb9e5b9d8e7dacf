"""Stop strings in text that comes in pieces, against a search of each prefix of the whole text."""

from __future__ import annotations

import random

import pytest

from jaxserve.text.stop_strings import StopStrings


def brute_force(stop: tuple[str, ...], text: str) -> tuple[str, str | None]:
    """Read on character by character until some stop string is complete; the longest one counts."""
    for end in range(len(text) + 1):
        complete = [one for one in stop if text[:end].endswith(one)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def feed(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None, list[str]]:
    strings = StopStrings(stop)
    emitted = []
    for piece in pieces:
        text, stopped = strings.push(piece)
        emitted.append(text)
        if stopped is not None:
            return "".join(emitted), stopped, emitted
    emitted.append(strings.flush())
    return "".join(emitted), None, emitted


def test_held_back_only_as_long_as_it_may_become_a_stop_string() -> None:
    strings = StopStrings(("\n\nUser:",))
    assert strings.push("Hello") == ("Hello", None)
    assert strings.push("!\n") == ("!", None)
    assert strings.push("\nUs") == ("", None)
    assert strings.push("e it") == ("\n\nUse it", None)
    assert strings.push("\n\n\nUser") == ("\n", None)
    assert strings.push(": x") == ("", "\n\nUser:")
    assert strings.push("more") == ("", "\n\nUser:")
    assert strings.flush() == ""


@pytest.mark.parametrize(
    ("stop", "text", "emitted", "stopped"),
    [
        ((), "abc", "abc", None),
        (("b",), "abcb", "a", "b"),
        (("abcd", "bc"), "xabcd", "xa", "bc"),  # bc is complete first
        (("c", "bc", "abc"), "xabc", "x", "abc"),  # together: no part of a stop string may be left
        (("aab",), "aaab", "a", "aab"),
        (("é", "🎉"), "x🎉", "x", "🎉"),
    ],
)
def test_which_one_stops(stop: tuple[str, ...], text: str, emitted: str, stopped: str | None) -> None:
    for pieces in ([text], list(text)):
        assert feed(stop, pieces)[:2] == (emitted, stopped)


def test_the_end_of_a_text_that_stayed_a_prefix_is_given_out() -> None:
    assert feed(("abc",), ["xab"]) == ("xab", None, ["x", "ab"])


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold non-empty strings"):
        StopStrings(("a", ""))


def test_random_texts_against_brute_force() -> None:
    for seed in range(6000):
        rng = random.Random(seed)
        letters = rng.choice(["ab", "abc", "aé🎉"])

        def word(longest: int, rng: random.Random = rng, letters: str = letters) -> str:
            return "".join(rng.choice(letters) for _ in range(rng.randint(1, longest)))

        stop = tuple(word(rng.choice([2, 6])) for _ in range(rng.randint(1, 4)))
        pieces = [word(rng.choice([1, 4])) if rng.random() < 0.9 else "" for _ in range(rng.randint(0, 15))]
        text = "".join(pieces)
        emitted, stopped, increments = feed(stop, pieces)
        assert (emitted, stopped) == brute_force(stop, text), (stop, pieces)
        # nothing was held longer than it had to be: what is missing could still become a stop string
        received = given = ""
        for piece, increment in zip(pieces, increments, strict=False):
            received, given = received + piece, given + increment
            if len(received) <= len(emitted):
                rest = received[len(given) :]
                assert not rest or any(one.startswith(rest) for one in stop)
