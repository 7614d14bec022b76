"""Properties of drawn data: tested on a few examples each time, and on many once in a while."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st


class Facts:
    """The properties of a test file, which take `data` and nothing else. `@facts(40)` makes a test of 40 examples."""

    def __init__(self) -> None:
        self._inner: dict[str, Callable[..., None]] = {}

    def __call__(self, examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
        def decorate(inner: Callable[..., None]) -> Callable[..., None]:
            self._inner[inner.__name__] = inner
            return settings(max_examples=examples)(given(data=st.data())(inner))

        return decorate

    @property
    def names(self) -> list[str]:
        return list(self._inner)

    def check(self, name: str, examples: int) -> None:
        """The property of this name on so many examples."""
        settings(max_examples=examples)(given(data=st.data())(self._inner[name]))()
