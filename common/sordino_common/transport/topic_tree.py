"""MQTT topic filters: which topics do `+` and `#` match (MQTT v5, section 4.7), and a tree that finds them fast.

The tree serves both ways round: filters as keys, to find those that match one topic (subscriptions), and topics as
keys, to find those that one filter matches (retained messages). A look-up costs the levels of the topic times the
wildcards met on the way, whatever the number of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final, Generic, TypeVar

from sordino_common.errors import LocalError

T = TypeVar("T")

_MAX_BYTES: Final = 65_535  # MQTT strings carry a 16-bit length
_KNOWN: Final = 4096  # topics that are remembered; what raises is not
_SHARED: Final = "$share"


def check_topic(topic: str) -> None:
    """Raises `LocalError` unless a packet can be published on `topic`."""
    if not topic or "+" in topic or "#" in topic or "\0" in topic or len(topic.encode()) > _MAX_BYTES:
        raise LocalError(f"topic {topic[:200]!r}: expected 1 to {_MAX_BYTES} bytes without +, # and NUL")


@lru_cache(maxsize=_KNOWN)
def topic_name(topic: str) -> bytes:
    """The bytes of a topic that a packet can be published on. Raises `LocalError` for another."""
    check_topic(topic)
    return topic.encode()


def check_filter(topic_filter: str) -> None:
    """Raises `LocalError` unless one can subscribe to `topic_filter`: wildcards fill a level, # only the last; a shared
    one is $share/GROUP/FILTER."""
    group, topic_filter = split_shared(topic_filter)
    if group is not None and (not group or "+" in group or "#" in group):
        raise LocalError(f"topic filter {_SHARED}/{group[:200]}/...: a group's name is not empty, and no wildcard")
    levels = topic_filter.split("/")
    wrong = any(("+" in level or "#" in level) and len(level) > 1 for level in levels) or "#" in levels[:-1]
    if not topic_filter or "\0" in topic_filter or wrong or len(topic_filter.encode()) > _MAX_BYTES:
        raise LocalError(f"topic filter {topic_filter[:200]!r}: + and # stand alone in a level, # in the last one")


def split_shared(topic_filter: str) -> tuple[str | None, str]:
    """(group, filter) of a shared subscription (MQTT v5, section 4.8.2); (None, filter) of any other."""
    if not topic_filter.startswith(f"{_SHARED}/"):
        return None, topic_filter
    _, group, *rest = topic_filter.split("/", 2)
    return group, rest[0] if rest else ""


class _Node(Generic[T]):
    __slots__ = ("children", "value")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.value: T | None = None


class TopicTree(Generic[T]):
    """Values by topic or topic filter, found by match, in the order of insertion at each level."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()

    def put(self, key: str, value: T) -> None:
        node = self._root
        for level in key.split("/"):
            node = node.children.setdefault(level, _Node())
        node.value = value

    def get(self, key: str) -> T | None:
        node = self._root
        for level in key.split("/"):
            child = node.children.get(level)
            if child is None:
                return None
            node = child
        return node.value

    def setdefault(self, key: str, value: T) -> T:
        known = self.get(key)
        if known is None:
            self.put(key, value)
            return value
        return known

    def remove(self, key: str) -> None:
        """Unknown keys: nothing happens."""
        path: list[tuple[_Node[T], str]] = []
        node = self._root
        for level in key.split("/"):
            if level not in node.children:
                return
            path.append((node, level))
            node = node.children[level]
        node.value = None
        for parent, level in reversed(path):  # branches that hold nothing go, or the tree would only grow
            child = parent.children[level]
            if child.children or child.value is not None:
                break
            del parent.children[level]

    def matching(self, topic: str) -> Iterator[T]:
        """Values whose keys, as filters, match `topic`. Wildcards do not match a first level that starts with `$`."""
        yield from _filters(self._root, topic.split("/"), 0)

    def matched_by(self, topic_filter: str) -> Iterator[T]:
        """Values whose keys, as topics, are matched by `topic_filter`."""
        yield from _topics(self._root, topic_filter.split("/"), 0)


def _filters(node: _Node[T], levels: list[str], at: int) -> Iterator[T]:
    wild = at > 0 or not levels[0].startswith("$")
    if wild and (rest := node.children.get("#")) is not None and rest.value is not None:
        yield rest.value  # `a/#` matches `a` too: it is looked for before the end is noticed
    if at == len(levels):
        if node.value is not None:
            yield node.value
        return
    if (exact := node.children.get(levels[at])) is not None:
        yield from _filters(exact, levels, at + 1)
    if wild and (plus := node.children.get("+")) is not None:
        yield from _filters(plus, levels, at + 1)


def _topics(node: _Node[T], levels: list[str], at: int) -> Iterator[T]:
    if at == len(levels):
        if node.value is not None:
            yield node.value
        return
    level = levels[at]
    if level == "#":
        yield from _everything(node, top=at == 0)
    elif level == "+":
        for name, child in node.children.items():
            if at > 0 or not name.startswith("$"):
                yield from _topics(child, levels, at + 1)
    elif (exact := node.children.get(level)) is not None:
        yield from _topics(exact, levels, at + 1)


def _everything(node: _Node[T], *, top: bool) -> Iterator[T]:
    if node.value is not None:
        yield node.value
    for name, child in node.children.items():
        if not (top and name.startswith("$")):
            yield from _everything(child, top=False)
