"""Biases by distance as models have them: T5's buckets, and ALiBi's slopes."""

import math

import torch
from torch import Tensor

from dtcp.sequence.arguments import FLOATS, check_ints, check_tensor


def t5_distance_bias(weight: Tensor, *, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """The `bias` of attention from the weight of T5's relative_attention_bias; differentiable.

    Near keys have a bucket of their own for each distance, farther ones share it with others, the
    more the farther they are, and all from `max_distance` on have one.

    Args:
        weight: [buckets, H].
        bidirectional: whether keys on the right have buckets of their own (an encoder's); else
            they count as the token itself.
        max_distance: tokens, at least as many as buckets.
    Returns:
        [H, 2 * max_distance + 1].

    From Raffel et al. 2020, section 2.1, https://arxiv.org/abs/1910.10683
    """
    check_tensor("T5's bias", shape="[buckets, H]", ndim=2, dtypes=FLOATS, weight=weight)
    buckets = weight.shape[0] // 2 if bidirectional else weight.shape[0]
    check_ints("T5's bias", max_distance=max_distance)
    if buckets < 2 or max_distance <= buckets // 2:
        raise ValueError(
            f"T5's bias has two buckets or more a side, and distances beyond half of them, got "
            f"weight.shape={tuple(weight.shape)}, bidirectional={bidirectional}, max_distance="
            f"{max_distance}: give the model's own num_buckets and max_distance."
        )
    distance = torch.arange(-max_distance, max_distance + 1, device=weight.device)
    back = distance.abs() if bidirectional else (-distance).clamp(min=0)
    near = buckets // 2
    # In fp32, as the models do: a border between two buckets is a matter of rounding.
    share = torch.log(back.clamp(min=1).float() / near) / math.log(max_distance / near)
    far = (near + (share * (buckets - near)).to(torch.int64)).clamp(max=buckets - 1)
    bucket = torch.where(back < near, back, far)
    if bidirectional:
        bucket = bucket + buckets * (distance > 0)
    return weight[bucket].mT


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The `slope` of attention with ALiBi: [H], fp32.

    A key that lies d tokens left of its query gets -slope * d. Powers of two by head; for another
    number of heads, those of the next smaller power of two and every other one of the next larger.

    From Press et al. 2022, section 3, https://arxiv.org/abs/2108.12409
    """
    check_ints("ALiBi", least=1, heads=heads)
    power = 1 << (heads.bit_length() - 1)

    def of_power(count: int) -> Tensor:
        number = torch.arange(1, count + 1, dtype=torch.float64, device=device)
        return 2.0 ** (-8.0 / count * number)

    return torch.cat((of_power(power), of_power(2 * power)[::2][: heads - power])).float()
