"""DeepSeek-V4: tokens to logits of the next token and, by MTP, of those after it."""

from typing import cast

from torch import Tensor, nn

from dtcp.experts.losses import RouterLoss
from dtcp.metadata import BatchMetadata
from dtcp.models.blocks import ParameterModule, RMSNorm
from dtcp.models.deepseek_v4.attention import Attention, GroupedLinear
from dtcp.models.deepseek_v4.config import DeepseekV4Config
from dtcp.models.deepseek_v4.experts import MoE, Router
from dtcp.models.deepseek_v4.hyper import HyperConnection, HyperHead, expand
from dtcp.models.inputs import check_model_inputs
from dtcp.models.moe import Experts, real_tokens


class Block(nn.Module):
    """Attention, then experts; each reads the collapsed residual streams and adds to them."""

    def __init__(self, config: DeepseekV4Config, layer: int) -> None:
        super().__init__()
        self.attention_streams = _connection(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mixture_streams = _connection(config)
        self.mixture_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixture = MoE(config, by_token=layer < config.num_hash_layers)

    def forward(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, attn_metadata: BatchMetadata
    ) -> Tensor:
        """Residual streams to residual streams, [B, L, N, D]."""
        collapsed, post, mix = self.attention_streams(x)
        out = self.attention(self.attention_norm(collapsed), position_ids, attn_metadata)
        x = expand(out, x, post, mix)
        collapsed, post, mix = self.mixture_streams(x)
        normed, real = self.mixture_norm(collapsed), real_tokens(attn_metadata)
        return expand(self.mixture(normed, input_ids, real), x, post, mix)


class MultiTokenPrediction(nn.Module):
    """One depth of multi-token prediction: the streams and a token ahead, through a block."""

    def __init__(self, config: DeepseekV4Config, depth: int) -> None:
        super().__init__()
        self.token_norm = RMSNorm(config.dim, config.norm_eps)
        self.token_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.stream_norm = RMSNorm(config.dim, config.norm_eps)
        self.stream_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.block = Block(config, config.num_layers + depth)
        self.head = _head(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def join(self, x: Tensor, token: Tensor) -> Tensor:
        """Add the embedding of the token ahead [B, L, D] to each of the streams [B, L, N, D]."""
        token = self.token_proj(self.token_norm(token))
        return token[:, :, None] + self.stream_proj(self.stream_norm(x))


class DeepseekV4(nn.Module):
    """Tokens to logits.

    Weights are drawn small until `init_weights` or a checkpoint fills them. To start a large
    model, build it on the meta device, parallelize it, then `to_empty` and `init_weights`.
    """

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.head = _head(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MultiTokenPrediction(config, depth) for depth in range(config.num_mtp_layers)
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attn_metadata: BatchMetadata,
        mtp_input_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Score the next token of every token.

        Args:
            input_ids: [B, L]; embeddings would not do, for the first layers look up their
                experts by token.
            position_ids: [B, L], of each token in its document.
            attn_metadata: of the batch, for the mixers: from batch_metadata or shard_batch.
            mtp_input_ids: [B, depths, L], the tokens 1, 2, .. ahead (dtcp.labels.look_ahead);
                None to leave multi-token prediction out.
        Returns:
            [B, L, V]; with mtp_input_ids a tuple of it and of one per depth.
        Raises:
            TypeError: embeddings instead of ids.
            ValueError: mtp_input_ids for another number of depths or tokens.
        """
        self._check(input_ids, mtp_input_ids)
        check_model_inputs("DeepseekV4", input_ids, position_ids, self.config.vocab_size)
        x = self.embedding(input_ids)[:, :, None].expand(-1, -1, self.config.streams, -1)
        for block in self.layers:
            x = block(x, input_ids, position_ids, attn_metadata)
        logits = self.lm_head(self.norm(self.head(x)))
        if mtp_input_ids is None:
            return logits
        all_logits = [logits]
        for module, ids in zip(self.mtp, mtp_input_ids.unbind(1), strict=True):
            depth = cast(MultiTokenPrediction, module)
            x = depth.join(x, self.embedding(ids))
            x = depth.block(x, ids, position_ids, attn_metadata)
            all_logits.append(self.lm_head(depth.norm(depth.head(x))))
        return tuple(all_logits)

    def init_weights(self, std: float = 0.02) -> None:
        """Draw all weights; what adds to the streams starts smaller in deeper models."""
        own_init = HyperConnection | HyperHead | GroupedLinear | ParameterModule | Router | Experts
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm | RouterLoss):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                adds_to_stream = name.endswith((".o_b_proj", ".down"))
                shrink = (2 * self.config.num_layers) ** -0.5 if adds_to_stream else 1.0
                for weight in module.parameters(recurse=False):
                    nn.init.normal_(weight, std=std * shrink)
            elif isinstance(module, own_init):
                module.reset_parameters()

    def _check(self, input_ids: Tensor, mtp_input_ids: Tensor | None) -> None:
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
            raise TypeError(
                f"DeepseekV4 reads token ids, for its hash layers look experts up by token, got "
                f"input_ids of {getattr(input_ids, 'dtype', input_ids)}: pass ids, not embeddings."
            )
        expected = (*input_ids.shape[:1], len(self.mtp), *input_ids.shape[1:])
        if mtp_input_ids is not None and mtp_input_ids.shape != expected:
            raise ValueError(
                f"DeepseekV4 predicts as far ahead as it has MTP layers, got "
                f"mtp_input_ids.shape={tuple(mtp_input_ids.shape)} for num_mtp_layers="
                f"{len(self.mtp)}: give [B, {len(self.mtp)}, L] = {expected}, or None."
            )


def _connection(config: DeepseekV4Config) -> HyperConnection:
    eps, norm_eps = config.stream_eps, config.norm_eps
    steps = config.sinkhorn_steps
    return HyperConnection(config.dim, config.streams, steps=steps, eps=eps, norm_eps=norm_eps)


def _head(config: DeepseekV4Config) -> HyperHead:
    eps, norm_eps = config.stream_eps, config.norm_eps
    return HyperHead(config.dim, config.streams, eps=eps, norm_eps=norm_eps)
