"""What FSDP holds beside its shards, moment by moment, in the order of torch 2.13.

Forward, a unit is gathered into a buffer and copied out of it, and the buffer stays until the next
unit is copied. Backward, the buffer goes at once, and the next one is on its way while a unit
computes. Gradients are copied into one tensor in the dtype in which they are summed; it stays
until the unit after it has its gradients.
"""

from dataclasses import dataclass, field, fields

from dtcp.planner.setup import Setup
from dtcp.planner.sharded_weights import Unit, sharding_ranks


@dataclass(frozen=True)
class UnitBytes:
    """Bytes of one unit on one rank.

    Args:
        whole: gathered, as modules read it.
        buffer: what it arrives in; nothing on one rank.
        cast: the rank's own shards in the dtype in which they are gathered, where that is another.
        gradients: whole, before they are summed.
        summed: the same in the dtype and with the padding in which they are summed.
        shard: of the summed ones, in that dtype.
        kept: of the summed ones, as the optimizer reads them.
    """

    whole: int
    buffer: int
    cast: int
    gradients: int
    summed: int
    shard: int
    kept: int

    @classmethod
    def of(cls, unit: Unit, setup: Setup) -> "UnitBytes":
        precision, degrees = setup.precision, setup.degrees
        total = dict.fromkeys((each.name for each in fields(cls)), 0)
        for weight in unit.weights:
            ranks, own = sharding_ranks(degrees, spread=weight.spread), weight.own(degrees)
            narrow = weight.dtype == precision.compute
            width = precision.reduce.itemsize if narrow else weight.dtype.itemsize
            whole = ranks * own * weight.dtype.itemsize
            total["whole"] += whole
            total["buffer"] += whole if ranks > 1 else 0
            if narrow and precision.compute != precision.master:
                total["cast"] += own * weight.dtype.itemsize
            if weight.trained:
                total["gradients"] += whole
                total["summed"] += ranks * own * width
                total["shard"] += own * width
                total["kept"] += own * precision.master.itemsize
        return cls(**total)


@dataclass(frozen=True)
class Moment:
    """Bytes beside activations and shards of weights: whole weights, and gradients."""

    gathered: int
    gradients: int


@dataclass
class GatheredWeights:
    """FSDP's state in a step. Each method returns the fullest moments on the way.

    Args:
        accumulates: whether gradients of earlier micro-batches are there, and added to.
        copies: whether a shard is summed in another dtype than the one it is kept in.
        replicas: summed shards are then kept until the end of the pass, for what comes next over
            the replicas' axis reads them.
    """

    accumulates: bool
    copies: bool
    replicas: bool
    done: int = 0
    """Gradients that are summed."""
    _whole: dict[int, int] = field(default_factory=dict)
    _arriving: dict[int, int] = field(default_factory=dict)
    _left: int = 0
    """The buffer of the last unit of the forward pass."""
    _summed: int = 0

    @property
    def now(self) -> Moment:
        gathered = sum(self._whole.values()) + sum(self._arriving.values()) + self._left
        return Moment(gathered, self.done + self._summed)

    def _above(self, gathered: int = 0, gradients: int = 0) -> Moment:
        now = self.now
        return Moment(now.gathered + gathered, now.gradients + gradients)

    def gather(self, key: int, unit: UnitBytes) -> list[Moment]:
        """Before a unit's forward pass."""
        moments = [self._above(unit.cast + unit.buffer)]
        self._left = unit.buffer
        self._whole[key] = unit.whole
        return [*moments, self.now]

    def free(self, key: int) -> None:
        """After its forward pass."""
        del self._whole[key]

    def end_forward(self) -> None:
        self._left = 0

    def prefetch(self, key: int, unit: UnitBytes) -> list[Moment]:
        """Before the backward pass of the unit that is after it in the model."""
        if key in self._whole or key in self._arriving:
            return []
        moments = [self._above(unit.cast + unit.buffer)]
        self._arriving[key] = unit.buffer
        return moments

    def gather_again(self, key: int, unit: UnitBytes) -> list[Moment]:
        """Before its backward pass."""
        if key in self._whole:
            return []
        moments = self.prefetch(key, unit)
        moments.append(self._above(unit.whole))
        del self._arriving[key]
        self._whole[key] = unit.whole
        return moments

    def sum_up(self, key: int, unit: UnitBytes, others: int) -> list[Moment]:
        """After its backward pass.

        Args:
            others: whole gradients of units that are not done yet.
        """
        self._whole.pop(key, None)
        self._summed = 0
        if not unit.summed:
            return []
        moments = [self._above(0, others + unit.gradients + unit.summed)]
        self._summed = unit.summed
        gathered = unit.shard + (unit.kept if self.copies else 0)
        moments.append(self._above(0, others + gathered))
        self.done += 0 if self.accumulates else unit.kept
        self.done += unit.shard if self.replicas and self.copies else 0
        return moments

    def settle(self) -> None:
        """The pass has ended."""
        self._summed = 0
