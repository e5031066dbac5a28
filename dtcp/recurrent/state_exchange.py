"""How the summaries of segments reach the ranks that read them: gathered or scanned."""

from dataclasses import dataclass

from dtcp.recurrent.exchange import summaries_received


@dataclass(frozen=True)
class GatherStates:
    """Every rank gathers the summaries of all segments, and folds those before its own: 1 round."""

    def scans(self, num_shards: int, segments: int, summary: int) -> bool:
        """Whether to scan, with summaries of so many bytes."""
        return False


@dataclass(frozen=True)
class ScanStates:
    """Ranks compose summaries in windows that double: ceil(log2(n)) rounds."""

    def scans(self, num_shards: int, segments: int, summary: int) -> bool:
        return True


@dataclass(frozen=True)
class FewestBytes:
    """Whichever of the two receives less, if what a scan saves is worth the rounds it adds.

    Small states are gathered: they cross in less time than one more round takes to begin.

    Args:
        a_round: bytes that have to be saved for each round beyond the first.
    """

    a_round: int = 2**20

    def scans(self, num_shards: int, segments: int, summary: int) -> bool:
        by_scan, by_gather = (
            summaries_received(num_shards, segments, scan=scan) for scan in (True, False)
        )
        more_rounds = (num_shards - 1).bit_length() - 1
        return (by_gather - by_scan) * summary > more_rounds * self.a_round


StateExchange = GatherStates | ScanStates | FewestBytes


FEWEST_BYTES = FewestBytes()
