"""The network that a config describes: which parts its blocks are given, and their initialization.

Weights are normal with standard deviation `initializer_range`. Projections into the residual stream
are scaled by 1 / √(2 n_blocks), because 2 n_blocks of them are summed (GPT-2: Radford et al. 2019).
Gains are 1, biases 0.
"""

from __future__ import annotations

from types import ModuleType

from mantrans.config import ModelConfig
from mantrans.layers import (
    GELUMLP,
    MLP,
    Angles,
    Attention,
    Block,
    Embedding,
    LayerNorm,
    Norm,
    Output,
    RMSNorm,
    Rotary,
    Scaling,
    SwiGLUMLP,
)
from mantrans.layers.embedding import vocabulary_table
from mantrans.models.network import Network
from mantrans.parameters import Parameter


def network(config: ModelConfig, ops: ModuleType, recompute_activation: bool = False) -> Network:
    """The network that `config` describes; vocab_size must be set."""
    V, C = config.vocab_size, config.d_model
    assert V is not None, "vocab_size must be set before a network is built"
    std = config.initializer_range
    T_max = config.max_seq_len if config.position == "learned" else None
    embedding = Embedding(ops, V, T_max, C, std=std)
    shared = angles(config)
    blocks: list[Block] = []
    branch_bias = None
    for i in range(config.n_blocks):
        name = f"blocks.{i}"
        heads = attention(config, ops, f"{name}.attention", shared)
        branch = mlp(config, ops, f"{name}.mlp", recompute_activation)
        blocks.append(
            Block(
                norm(config, ops, f"{name}.norm_1", branch_bias),
                heads,
                norm(config, ops, f"{name}.norm_2", heads.projection.bias),
                branch,
            )
        )
        branch_bias = branch.down.bias
    final_norm = norm(config, ops, "final_norm", branch_bias)
    tied = config.tie_embeddings
    table = embedding.tokens if tied else vocabulary_table("output.weight", V, C, std)
    return Network(embedding, blocks, final_norm, Output(ops, table, tied), shared)


def norm(config: ModelConfig, ops: ModuleType, name: str, branch_bias: Parameter | None) -> Norm:
    """branch_bias: the last bias of the branch before it."""
    C, epsilon = config.d_model, config.layer_norm_epsilon
    if config.norm == "rms_norm":
        return RMSNorm(ops, name, C, epsilon=epsilon, branch_bias=branch_bias)
    return LayerNorm(ops, name, C, epsilon=epsilon, bias=config.bias, branch_bias=branch_bias)


def attention(config: ModelConfig, ops: ModuleType, name: str, shared: Angles | None) -> Attention:
    resolved = config.resolved()
    heads = {"n_heads": config.n_heads, "n_kv_heads": config.key_value_heads}
    rotary = None
    if shared is not None:
        epsilon = config.layer_norm_epsilon if config.qk_norm else None
        rotary = Rotary(ops, name, shared, **heads, norm_epsilon=epsilon)
    return Attention(
        ops,
        name,
        config.d_model,
        **heads,
        head_width=config.head_width,
        std=config.initializer_range,
        residual_std=residual_std(config),
        qkv_bias=resolved["qkv_bias"],
        projection_bias=resolved["projection_bias"],
        rotary=rotary,
        window=config.attention_window,
    )


def angles(config: ModelConfig) -> Angles | None:
    """The angles of RoPE. Beside learned positions they are 0, and needed only with norms of heads,
    because norm and rotation are one operation."""
    turned = config.position == "rope"
    if not turned and not config.qk_norm:
        return None
    scaling = config.rope_scaling_factor and Scaling(
        config.rope_scaling_factor,
        config.rope_low_freq_factor,
        config.rope_high_freq_factor,
        config.rope_original_length,
    )
    theta = config.rope_theta if turned else None
    return Angles(config.max_seq_len, config.head_width, theta, scaling or None)


def mlp(config: ModelConfig, ops: ModuleType, name: str, recompute_activation: bool) -> MLP:
    kind = SwiGLUMLP if config.mlp == "swiglu" else GELUMLP
    return kind(
        ops,
        name,
        config.d_model,
        config.feed_forward_width,
        std=config.initializer_range,
        residual_std=residual_std(config),
        bias=config.resolved()["mlp_bias"],
        recompute_activation=recompute_activation,
    )


def residual_std(config: ModelConfig) -> float:
    return config.initializer_range / (2 * config.n_blocks) ** 0.5
