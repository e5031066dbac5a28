"""Experts on ranks of their own: tokens travel to the experts that their router chose, and back."""

from dtcp.experts.exchange import AllToAllExchange, NodeExchange, TokenExchange
from dtcp.experts.losses import RouterLoss, balance_loss_share, z_loss_share

__all__ = [
    "AllToAllExchange",
    "NodeExchange",
    "RouterLoss",
    "TokenExchange",
    "balance_loss_share",
    "z_loss_share",
]
