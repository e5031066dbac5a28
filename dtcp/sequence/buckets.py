"""Sizes that batches are padded to, so that a compiled model meets few of them.

A compiled block has a graph for each size of its inputs, and dynamo gives up after a number of
graphs: rows of any length would compile at every batch. A rule rounds sizes up to a few; what is
added is padding, which no token sees and no loss counts, but which every layer computes:
`padding_fraction` says how much of it there is.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from dtcp.sequence.arguments import check_ints, is_whole


class Rounding(ABC):
    """A rule that rounds sizes up; two that round alike are equal."""

    @abstractmethod
    def round_up(self, size: int) -> int:
        """The size that a batch of `size` is padded to, `size` or more.

        Raises:
            ValueError: more than the rule goes up to.
        """

    def padding_fraction(self, sizes: Iterable[int]) -> float:
        """The share of padding in what comes out, for a sample of sizes: from 0 to below 1."""
        whole = list(sizes)
        padded = sum(map(self.round_up, whole))
        return 1 - sum(whole) / padded if padded else 0.0

    def _check_most(self, least: int, most: int | None) -> None:
        if most is None:
            return
        check_ints(type(self).__name__, most=most)
        if most < least:
            raise ValueError(
                f"{type(self).__name__} rounds sizes up to `most`, got most={most} below {least}: "
                f"give more."
            )

    def _check(self, size: int, most: int | None) -> None:
        check_ints("A bucket", least=1, size=size)
        if most is not None and size > most:
            raise ValueError(
                f"A bucket holds the rows of its batch, got size={size} for {self}: cut them, or "
                f"give a rule that goes further."
            )


@dataclass(frozen=True)
class PowersOfTwo(Rounding):
    """1, 2, 4, 8, ..: log2(most / least) + 1 graphs, whatever comes.

    Padding is below a half of what comes out; for sizes that are spread evenly over one octave,
    a quarter.

        least=4, most=24        3 -> 4    5 -> 8    9 -> 16    17 -> 24

    Args:
        least: the smallest size that comes out, itself a power of two.
        most: the largest size that comes out, a power of two or not, as the positions that a model
            has; more is refused. None: no end.
    """

    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        check_ints("Powers of two", first=self.least)
        if self.least < 1 or self.least & (self.least - 1):
            raise ValueError(
                f"Powers of two begin with one, got least={self.least}: give "
                f"{1 << (max(self.least, 1) - 1).bit_length()}."
            )
        self._check_most(self.least, self.most)

    def round_up(self, size: int) -> int:
        self._check(size, self.most)
        rounded = max(self.least, 1 << (size - 1).bit_length())
        return rounded if self.most is None else min(rounded, self.most)


@dataclass(frozen=True)
class MultiplesOf(Rounding):
    """step, 2 * step, ..: most / step graphs, with at most step - 1 of padding.

        step=4        3 -> 4    5 -> 8    9 -> 12

    Args:
        most: the largest size that comes out, a multiple or not; more is refused. None: no end,
            and so no bound on the number of graphs.
    """

    step: int
    most: int | None = None

    def __post_init__(self) -> None:
        check_ints("Multiples", least=1, step=self.step)
        self._check_most(self.step, self.most)

    def round_up(self, size: int) -> int:
        self._check(size, self.most)
        rounded = -(-size // self.step) * self.step
        return rounded if self.most is None else min(rounded, self.most)


@dataclass(frozen=True)
class OneOf(Rounding):
    """The smallest of these sizes that holds a batch: as many graphs as there are sizes."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = isinstance(self.sizes, tuple) and all(map(is_whole, self.sizes))
        if not ascending or not self.sizes or sorted({*self.sizes, 0}) != [0, *self.sizes]:
            raise ValueError(
                f"Sizes to round up to are ints that ascend from 1 or more, got "
                f"sizes={self.sizes!r}: give a tuple of them, (1024, 4096), say."
            )

    def round_up(self, size: int) -> int:
        self._check(size, self.sizes[-1])
        return next(x for x in self.sizes if x >= size)


@dataclass(frozen=True)
class Buckets:
    """What a batch is padded to: tokens per row, and rows.

    Args:
        tokens: rounds the length of rows; a layout may need a multiple on top of it. None leaves
            the length as it is.
        rows: rounds their number, for loaders whose last batch has fewer; the rows added hold
            nothing but padding. None leaves the number as it is.
    """

    tokens: Rounding | None = None
    rows: Rounding | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and self.rows is None:
            raise ValueError(
                "Buckets round tokens or rows, got tokens=None, rows=None: give "
                "Buckets(PowersOfTwo()), say."
            )
        for name, rule in (("tokens", self.tokens), ("rows", self.rows)):
            if rule is not None and not isinstance(rule, Rounding):
                raise TypeError(
                    f"Buckets round by a rule, got {name}={rule!r}: give PowersOfTwo(), "
                    f"MultiplesOf(256) or OneOf((1024, 4096))."
                )

    def padded_tokens(self, seq_len: int) -> int:
        """Tokens per row."""
        return seq_len if self.tokens is None else self.tokens.round_up(seq_len)

    def padded_rows(self, rows: int) -> int:
        """The number of rows."""
        return rows if self.rows is None else self.rows.round_up(rows)
