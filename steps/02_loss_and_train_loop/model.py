"""The GPT of "Language Models are Unsupervised Multitask Learners" (GPT-2), on one process.

Shape letters: B batch, T sequence, D d_model, F d_ff, V vocabulary, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from config import IGNORED, GPTConfig
from torch import Tensor, nn

EMBEDDING_STD = 0.02


class MultiHeadSelfAttention(nn.Module):
    """Causal self-attention. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.n_heads * config.head_width  # H*K, which need not be D
        self.head_width = config.head_width
        self.query_key_value = nn.Linear(config.d_model, 3 * width, config.bias)
        self.dense = nn.Linear(width, config.d_model, config.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, 1, T, T), true where a query may look at a key; causal unless given."""
        fused = self.query_key_value(x)  # (B, T, 3*H*K)
        fused = fused.unflatten(-1, (3, -1, self.head_width))  # (B, T, 3, H, K)
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(2))  # (B, H, T, K)
        heads = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        return self.dense(heads.transpose(1, 2).flatten(2))  # (B, T, H*K) -> (B, T, D)


class FeedForward(nn.Module):
    """Two linear layers with GELU between. (B, T, D) -> (B, T, D)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.d_model, config.ff_width, config.bias)
        self.dense_4h_to_h = nn.Linear(config.ff_width, config.d_model, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.dense_h_to_4h(x), approximate="tanh")  # (B, T, F)
        return self.dense_4h_to_h(hidden)  # (B, T, D)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attention = MultiHeadSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPTModel(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model, bias=config.bias)
        # Tied, it is the same module under a second name, and its weight one parameter.
        self.output_head = (
            self.token_embedding if config.tied else nn.Embedding(config.vocab_size, config.d_model)
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss); logits are None with labels and return_logits=False.

        input_ids: (B, T). logits: (B, T, V).
        attention_mask: (B, T), 1 for a token, 0 for padding on either side; positions count the
        tokens only, so padding moves nothing. Logits at padding mean nothing.
        labels: (B, T), the token that should FOLLOW each input, so already shifted by one; -100,
        and whatever stands at or before padding, is ignored. loss: the mean over the rest, in
        nats; 0 if nothing is left.
        Raises ValueError if T exceeds context_length.
        """
        T = input_ids.shape[1]
        if self.config.context_length < T:
            raise ValueError(f"{T} tokens exceed context_length={self.config.context_length}")
        positions = positions_of(input_ids, attention_mask)
        mask = None if attention_mask is None else causal_padding_mask(attention_mask)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)  # (B, T, D)
        for block in self.blocks:
            x = block(x, mask)
        logits = F.linear(self.final_norm(x), self.output_head.weight)  # (B, T, V)
        if labels is None:
            return logits, None
        loss = mean_loss(logits, labels, attention_mask)
        return (logits if return_logits else None), loss


def positions_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(T,), or (B, T) where a mask (B, T) says what is padding: it is not counted."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def causal_padding_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T): a query sees the tokens up to itself, padding sees itself.

    Softmax over nothing is nothing: kernels differ in what they make of a row without any key.
    """
    T = attention_mask.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=attention_mask.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=attention_mask.device)
    return (causal & attention_mask.bool()[:, None, :] | itself)[:, None]


def mean_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The mean cross-entropy in nats over the labels that count; 0 if none does.

    logits: (B, T, V). labels: (B, T), -100 is ignored, and what stands at or before padding.
    """
    if attention_mask is not None:
        real = attention_mask.bool()
        followed = torch.cat([real[:, 1:], real[:, -1:]], dim=1)
        labels = labels.masked_fill(~(real & followed), IGNORED)
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


@torch.no_grad()
def init_weights(model: GPTModel, seed: int) -> None:
    """Fills every parameter: small embeddings, so that the first loss is near ln V."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            embedding = "embedding" in name or "head" in name
            std = EMBEDDING_STD if embedding else parameter.shape[1] ** -0.5
            parameter.normal_(0, std, generator=generator)
