"""What `dtcp.check` says of every language model of the installed transformers, as a table."""

from docs.families.cases import Case, all_cases
from docs.families.outcome import RESULTS, Results
from docs.families.page import PAGE, page_of

__all__ = ["PAGE", "RESULTS", "Case", "Results", "all_cases", "page_of"]
