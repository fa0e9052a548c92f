"""What the cache holds in memory: predictions by their keys, and keys by bodies."""

import tracemalloc

import pytest

from app.known_bodies import MAX_BODIES, MAX_BODY_BYTES, KnownBodies
from app.memory_store import ENTRY_OVERHEAD_BYTES, MemoryStore


class TestMemory:
    def test_what_was_not_asked_for_the_longest_goes_first(self) -> None:
        store = MemoryStore(max_bytes=3 * (ENTRY_OVERHEAD_BYTES + 1))
        for key in (b"a", b"b", b"c"):
            store.put({key: b"x"})
        store.get(b"a")
        store.put({b"d": b"x"})
        assert [key for key in (b"a", b"b", b"c", b"d") if store.get(key)] == [b"a", b"c", b"d"]

    def test_what_is_too_large_is_not_kept_and_what_is_replaced_counts_once(self) -> None:
        store = MemoryStore(1000)
        store.put({b"a": b"x" * 10})
        store.put({b"b": b"x" * 2000})
        assert not store.get(b"b")
        store.put({b"a": b"x" * 100})
        assert store.bytes_held == ENTRY_OVERHEAD_BYTES + 100
        for _ in range(2):
            store.discard(b"a")
        assert store.bytes_held == 0

    @pytest.mark.parametrize("size", [20, 2000])
    def test_its_bytes_are_those_that_it_takes(self, size: int) -> None:
        most = 4_000_000
        store = MemoryStore(most)
        tracemalloc.start()
        try:
            for number in range(3 * most // (size + ENTRY_OVERHEAD_BYTES)):
                store.put({number.to_bytes(32): b"%*d" % (size, number)})
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert 0.5 * most < taken < 1.1 * most


class TestKnownBodies:
    def test_the_same_body_has_the_same_key_and_no_other_has(self) -> None:
        bodies = KnownBodies()
        bodies.note(b'{"x": 1}', b"one")
        assert bodies.key_of(b'{"x": 1}') == b"one"
        assert bodies.key_of(b'{"x":1}') is None

    def test_two_with_the_same_hash_are_told_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("app.known_bodies.hash", lambda _: 1, raising=False)
        bodies = KnownBodies()
        bodies.note(b"one", b"1")
        assert bodies.key_of(b"other") is None
        bodies.note(b"other", b"2")
        assert bodies.key_of(b"other") == b"2"
        assert bodies.key_of(b"one") is None

    def test_it_holds_so_many_and_none_that_is_long(self) -> None:
        bodies = KnownBodies()
        for number in range(MAX_BODIES + 1):
            bodies.note(b"%d" % number, b"key")
        assert bodies.key_of(b"0") is None
        assert bodies.key_of(b"1") == bodies.key_of(b"%d" % MAX_BODIES) == b"key"
        assert len(bodies._entries) == MAX_BODIES
        # That which was asked for stays.
        bodies.note(b"one more", b"key")
        assert bodies.key_of(b"1") == b"key"
        assert bodies.key_of(b"2") is None
        assert bodies.key_of(b"1" * (MAX_BODY_BYTES + 1)) is None
