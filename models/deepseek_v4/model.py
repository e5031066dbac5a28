"""DeepSeek-V4: tokens to logits, and to those of the tokens after the next (MTP)."""

from typing import cast

from torch import Tensor, nn

from dtcp.metadata import BatchMetadata
from dtcp.models.blocks import RMSNorm
from dtcp.models.deepseek_v4.attention import Attention, GroupedLinear, Table
from dtcp.models.deepseek_v4.config import DeepseekV4Config
from dtcp.models.deepseek_v4.experts import Mixture, Router
from dtcp.models.deepseek_v4.hyper import HyperConnection, HyperHead, expand
from dtcp.models.moe import Experts


class Block(nn.Module):
    """Attention, then experts; each reads what the streams are collapsed to."""

    def __init__(self, config: DeepseekV4Config, layer: int) -> None:
        super().__init__()
        self.attention_streams = _connection(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mixture_streams = _connection(config)
        self.mixture_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixture = Mixture(config, by_token=layer < config.num_hash_layers)

    def forward(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Streams to streams, [B, L, N, D]."""
        part, leave, mix = self.attention_streams(x)
        x = expand(
            self.attention(self.attention_norm(part), position_ids, attn_metadata), x, leave, mix
        )
        part, leave, mix = self.mixture_streams(x)
        return expand(self.mixture(self.mixture_norm(part), input_ids), x, leave, mix)


class Prediction(nn.Module):
    """One depth of multi-token prediction: the streams and the next token, through a block."""

    def __init__(self, config: DeepseekV4Config, depth: int) -> None:
        super().__init__()
        self.token_norm = RMSNorm(config.dim, config.norm_eps)
        self.token_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.stream_norm = RMSNorm(config.dim, config.norm_eps)
        self.stream_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.block = Block(config, config.num_layers + depth)
        self.head = _head(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def enter(self, x: Tensor, token: Tensor) -> Tensor:
        """Streams [B, L, N, D] and the embedding of the token ahead [B, L, D], as streams."""
        token = self.token_proj(self.token_norm(token))
        return token[:, :, None] + self.stream_proj(self.stream_norm(x))


class DeepseekV4(nn.Module):
    """Tokens to logits.

    Weights are drawn small until `init_weights` or a checkpoint fills them; build on the meta
    device, parallelize, `to_empty`, then `init_weights` to start a large model.
    """

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.head = _head(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(Prediction(config, k) for k in range(config.num_mtp_layers))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attn_metadata: BatchMetadata,
        mtp_input_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Score the next token of every token.

        Args:
            input_ids: [B, L]; embeddings alone would not do, for the first layers look up
                their experts by token.
            position_ids: [B, L], the position of each token in its document.
            attn_metadata: what the batch brings for the mixers.
            mtp_input_ids: [B, depths, L], the tokens 1, 2, .. ahead (dtcp.labels.look_ahead);
                None to leave multi-token prediction out.
        Returns:
            [B, L, V]; with mtp_input_ids a tuple of it and of each depth's.
        """
        self._check(input_ids, mtp_input_ids)
        x = self.embedding(input_ids)[:, :, None].expand(-1, -1, self.config.streams, -1)
        for block in self.layers:
            x = block(x, input_ids, position_ids, attn_metadata)
        logits = self.lm_head(self.norm(self.head(x)))
        if mtp_input_ids is None:
            return cast(Tensor, logits)
        found = [logits]
        for module, ids in zip(self.mtp, mtp_input_ids.unbind(1), strict=True):
            depth = cast(Prediction, module)
            x = depth.enter(x, self.embedding(ids))
            x = depth.block(x, ids, position_ids, attn_metadata)
            found.append(self.lm_head(depth.norm(depth.head(x))))
        return tuple(found)

    def init_weights(self, std: float = 0.02) -> None:
        """Draw all weights; what adds to the streams starts smaller, the deeper the model."""
        drawn = HyperConnection | HyperHead | GroupedLinear | Table | Router | Experts
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                adds_to_stream = name.endswith((".o_b_proj", ".down"))
                shrink = (2 * self.config.num_layers) ** -0.5 if adds_to_stream else 1.0
                for weight in module.parameters(recurse=False):
                    nn.init.normal_(weight, std=std * shrink)
            elif isinstance(module, drawn):
                module.reset_parameters()

    def _check(self, input_ids: Tensor, mtp_input_ids: Tensor | None) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
            raise TypeError(
                f"DeepseekV4 reads token ids, for its hash layers look experts up by token, got "
                f"input_ids of {getattr(input_ids, 'dtype', input_ids)}: pass ids, not embeddings."
            )
        wanted = (len(input_ids), len(self.mtp), input_ids.shape[1])
        if mtp_input_ids is not None and mtp_input_ids.shape != wanted:
            raise ValueError(
                f"DeepseekV4 predicts as far ahead as it has MTP layers, got "
                f"mtp_input_ids.shape={tuple(mtp_input_ids.shape)} for num_mtp_layers="
                f"{len(self.mtp)}: give [B, {len(self.mtp)}, L] = {wanted}, or None."
            )


def _connection(config: DeepseekV4Config) -> HyperConnection:
    eps, norm_eps = config.stream_eps, config.norm_eps
    steps = config.sinkhorn_steps
    return HyperConnection(config.dim, config.streams, steps=steps, eps=eps, norm_eps=norm_eps)


def _head(config: DeepseekV4Config) -> HyperHead:
    eps, norm_eps = config.stream_eps, config.norm_eps
    return HyperHead(config.dim, config.streams, eps=eps, norm_eps=norm_eps)
