"""Which topic filters one party holds, counted: a filter ends when the last of those who asked for it lets go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sordino_common.transport.topic_tree import check_filter


class Subscriptions:
    """Filters in the order in which they were first asked for. `ended(filter)` is called when one is no longer held."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._ended = ended
        self._holders: dict[str, int] = {}

    def hold(self, topic_filter: str) -> Callable[[], None]:
        """Hold `topic_filter`. Returns the function that lets go; calling it twice does nothing more.

        Raises `LocalError` for what is no topic filter."""
        check_filter(topic_filter)
        self._holders[topic_filter] = self._holders.get(topic_filter, 0) + 1
        held = True

        def let_go() -> None:
            nonlocal held
            if held:
                held = False
                self._let_go(topic_filter)

        return let_go

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._holders))

    def __contains__(self, topic_filter: str) -> bool:
        return topic_filter in self._holders

    def _let_go(self, topic_filter: str) -> None:
        self._holders[topic_filter] -= 1
        if not self._holders[topic_filter]:
            del self._holders[topic_filter]
            self._ended(topic_filter)
