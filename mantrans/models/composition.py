"""GPT-2 (Radford et al. 2019): the parts of its network, and their initialization.

Weights are normal with standard deviation `initializer_range`. Projections into the residual stream
are scaled by 1 / √(2 n_blocks), because 2 n_blocks of them are summed. Gains are 1, biases 0.
"""

from __future__ import annotations

from types import ModuleType

from mantrans.config import ModelConfig
from mantrans.layers import MLP, Attention, Block, Embedding, LayerNorm, Output
from mantrans.layers.embedding import vocabulary_table
from mantrans.models.network import Network
from mantrans.parameters import Parameter


def network(config: ModelConfig, ops: ModuleType, recompute_gelu: bool = False) -> Network:
    """The network that `config` describes; vocab_size must be set."""
    V, C = config.vocab_size, config.d_model
    assert V is not None, "vocab_size must be set before a network is built"
    std = config.initializer_range
    embedding = Embedding(ops, V, config.max_seq_len, C, std=std)
    blocks: list[Block] = []
    branch_bias = None
    for i in range(config.n_blocks):
        blocks.append(block(config, ops, f"blocks.{i}", branch_bias, recompute_gelu))
        branch_bias = blocks[-1].mlp.down.bias
    final_norm = norm(config, ops, "final_norm", branch_bias)
    tied = config.tie_embeddings
    table = embedding.tokens if tied else vocabulary_table("output.weight", V, C, std)
    return Network(embedding, blocks, final_norm, Output(ops, table, tied))


def block(
    config: ModelConfig,
    ops: ModuleType,
    name: str,
    branch_bias: Parameter | None,
    recompute_gelu: bool,
) -> Block:
    """One block. branch_bias: the last bias of the branch before it."""
    C, H, std = config.d_model, config.n_heads, config.initializer_range
    common = {"std": std, "residual_std": std / (2 * config.n_blocks) ** 0.5, "bias": config.bias}
    attention = Attention(
        ops, f"{name}.attention", C, n_heads=H, n_kv_heads=H, head_width=C // H, **common
    )
    mlp = MLP(
        ops,
        f"{name}.mlp",
        C,
        config.feed_forward_width,
        recompute_gelu=recompute_gelu,
        **common,
    )
    return Block(
        norm(config, ops, f"{name}.norm_1", branch_bias),
        attention,
        norm(config, ops, f"{name}.norm_2", attention.projection.bias),
        mlp,
    )


def norm(
    config: ModelConfig, ops: ModuleType, name: str, branch_bias: Parameter | None
) -> LayerNorm:
    return LayerNorm(
        ops,
        name,
        config.d_model,
        epsilon=config.layer_norm_epsilon,
        bias=config.bias,
        branch_bias=branch_bias,
    )
