"""Which pages hold which tokens of one rank. Host only; every rank keeps the books of all ranks."""

from array import array
from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Held:
    """One sequence's pages on one rank, in order, and how many tokens they hold."""

    pages: array = field(default_factory=lambda: array("i"))  # which numpy takes as it is
    tokens: int = 0


class PageTable:
    """The pages of one rank. A page may be shared by sequences that forked; who writes copies it."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages))[::-1]  # taken from the end: ascending, neighbours first
        self._users = [0] * num_pages
        self._held: dict[int, Held] = {}

    @property
    def num_free(self) -> int:
        """How many pages nobody uses."""
        return len(self._free)

    def held(self, number: int) -> Held:
        """Return what the sequence holds here; nothing for one that is not known."""
        return self._held.get(number) or Held()

    def pages_for(self, new: list[tuple[int, int]]) -> int:
        """Return how many free pages it takes to append to sequences: (number, tokens above 0)."""
        pages, writers = 0, Counter()
        for number, tokens in new:
            held = self.held(number)
            pages += -(-(held.tokens + tokens) // self.page_size) - len(held.pages)
            if self._must_copy(held):
                writers[held.pages[-1]] += 1
        # Where all that share a page write, the last of them keeps it.
        return pages + sum(min(n, self._users[page] - 1) for page, n in writers.items())

    def must_copy(self, number: int) -> bool:
        """Return whether the sequence's last page will be copied by the next append."""
        return self._must_copy(self.held(number))

    def append(self, number: int, tokens: int) -> list[tuple[int, int]]:
        """Make room for so many tokens; there must be. Return the (from, to) pages to copy."""
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = Held()
        copies = []
        if tokens and self._must_copy(held):
            shared, mine = held.pages[-1], self._take()
            self._users[shared] -= 1
            held.pages[-1] = mine
            copies.append((shared, mine))
        held.tokens += tokens
        while len(held.pages) * self.page_size < held.tokens:
            held.pages.append(self._take())
        return copies

    def truncate(self, number: int, tokens: int) -> None:
        """Keep at most so many tokens of the sequence."""
        held = self._held.get(number)
        if held is None or held.tokens <= tokens:
            return
        held.tokens = tokens
        while (len(held.pages) - 1) * self.page_size >= tokens and held.pages:
            self._leave(held.pages.pop())

    def fork(self, number: int, new: int) -> None:
        """Let sequence `new` share all pages of another."""
        held = self.held(number)
        for page in held.pages:
            self._users[page] += 1
        self._held[new] = Held(held.pages[:], held.tokens)

    def free(self, number: int) -> None:
        """Give the sequence's pages back."""
        for page in self._held.pop(number, Held()).pages:
            self._leave(page)

    def slots(self, number: int) -> list[tuple[int, int]]:
        """Return (first slot, tokens) of each stretch of neighbouring pages, in order."""
        held, stretches = self.held(number), []
        for index, page in enumerate(held.pages):
            tokens = min(self.page_size, held.tokens - index * self.page_size)
            slot = page * self.page_size
            if stretches and slot == stretches[-1][0] + stretches[-1][1]:
                stretches[-1] = stretches[-1][0], stretches[-1][1] + tokens
            else:
                stretches.append((slot, tokens))
        return stretches

    def _must_copy(self, held: Held) -> bool:
        partly_full = held.tokens % self.page_size != 0
        return partly_full and self._users[held.pages[-1]] > 1

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _leave(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._free.append(page)
