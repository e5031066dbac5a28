"""Experts on ranks of their own: tokens travel to the experts that their router chose, and back."""

from dtcp.experts.exchange import AllToAllExchange, NodeExchange, RoutedTokens, TokenExchange
from dtcp.experts.libraries import installed_libraries, library_for
from dtcp.experts.library_exchange import LibraryExchange
from dtcp.experts.losses import RouterLoss, balance_loss_share, z_loss_share

__all__ = [
    "AllToAllExchange",
    "LibraryExchange",
    "NodeExchange",
    "RoutedTokens",
    "RouterLoss",
    "TokenExchange",
    "balance_loss_share",
    "installed_libraries",
    "library_for",
    "z_loss_share",
]
