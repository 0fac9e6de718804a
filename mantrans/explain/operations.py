"""What the page says of each operation, and the names that it gives to what one takes and returns.

Shapes, code and numbers are not here: they are read from the run and from the source.
"""

from __future__ import annotations

from typing import NamedTuple


class Way(NamedTuple):
    """One direction of an operation."""

    formulas: tuple[str, ...]
    why: str


class Operation(NamedTuple):
    """inputs, outputs: (value, gradient), names of the forward's and of the backward's values;
    inside: the same of local variables. derivation: a page of docs/gradients."""

    title: str
    derivation: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    inside: tuple[tuple[str, str], ...]
    forward: Way
    backward: Way


# The first result of each function; where the page gives an argument another name, that too.
RESULTS = {
    "embedding_forward": "x",
    "layer_norm_forward": "y",
    "layer_norm_backward": "dx",
    "rms_norm_forward": "y",
    "rms_norm_backward": "dx",
    "add_layer_norm_forward": "y",
    "add_rms_norm_forward": "y",
    "linear_forward": "y",
    "linear_backward": "dx",
    "attention_forward": "out",
    "attention_backward": "dqkv",
    "rotary_forward": "rotated",
    "rotary_backward": "dqkv",
    "norm_rotary_forward": "rotated",
    "norm_rotary_backward": "dqkv",
    "bias_gelu_forward": "a",
    "bias_gelu_backward": "dh",
    "swiglu_forward": "a",
    "swiglu_backward": "dh",
    "cross_entropy_forward": "losses",
    "cross_entropy_backward": "dlogits",
}
RENAMED = {f"{kind}_backward": {"dqkv": "drotated"} for kind in ("rotary", "norm_rotary")}


_NORM = {
    "inputs": (("x", "dx"),),
    "outputs": (("y", "dy"),),
    "inside": (("x_hat", "g"),),
}
_LAYER_NORM = Operation(
    "Layer norm",
    "layer_norm",
    **_NORM,
    forward=Way(
        ("x̂ = (x − μ) / √(σ² + ε)", "y = γ x̂ + β"),
        "Each token's vector is brought to mean 0 and variance 1, so that the next layer sees "
        "numbers of one size, however large the residual has grown.",
    ),
    backward=Way(
        ("g = γ dy", "dx = (g − mean(g) − x̂ mean(g x̂)) / √(σ² + ε)", "dγ += Σ dy x̂;  dβ += Σ dy"),
        "μ and σ depend on every element of the row. Neither a shift nor a stretch of the row "
        "changes y, so the gradient loses two parts: its mean, and its share along x̂.",
    ),
)
_RMS_NORM = Operation(
    "RMS norm",
    "rms_norm",
    **_NORM,
    forward=Way(
        ("x̂ = x / √(mean(x²) + ε)", "y = γ x̂"),
        "Each token's vector is brought to a mean square of 1; its mean is left as it is.",
    ),
    backward=Way(
        ("g = γ dy", "dx = (g − x̂ mean(g x̂)) / √(mean(x²) + ε)", "dγ += Σ dy x̂"),
        "A stretch of the row does not change y, so the gradient loses its share along x̂.",
    ),
)


def _after_addition(norm: Operation) -> Operation:
    """The norm that first adds a branch to the residual."""
    forward = Way(
        ("x = residual + branch", *norm.forward.formulas),
        "The branch's output is added to the residual. " + norm.forward.why,
    )
    return norm._replace(forward=forward)


OPERATIONS = {
    "embedding": Operation(
        "Embedding",
        "linear_and_embedding",
        inputs=(),
        outputs=(("x", "dx"),),
        inside=(),
        forward=Way(
            ("x[t] = token row + position row",),
            "Each token becomes a vector: its row of a table. Here the residual begins.",
        ),
        backward=Way(
            ("d row = Σ dx[t] over all t that read it",),
            "A row is an input of every position that read it, so its gradients add up; rows "
            "that no token read receive none.",
        ),
    ),
    "layer_norm": _LAYER_NORM,
    "add_layer_norm": _after_addition(_LAYER_NORM),
    "rms_norm": _RMS_NORM,
    "add_rms_norm": _after_addition(_RMS_NORM),
    "linear": Operation(
        "Linear",
        "linear_and_embedding",
        inputs=(("x", "dx"),),
        outputs=(("y", "dy"),),
        inside=(),
        forward=Way(
            ("y = x Wᵀ + b",),
            "Every output is a weighted sum of the inputs of its own token.",
        ),
        backward=Way(
            ("dx = dy W", "dW += dyᵀ x", "db += Σ dy"),
            "W carried x to y; the gradient goes back over the same weights. A weight's gradient "
            "is what came in on one side times the gradient on the other, summed over tokens.",
        ),
    ),
    "rotary": Operation(
        "Rotary position",
        "rotary",
        inputs=(("qkv", "dqkv"),),
        outputs=(("rotated", "drotated"),),
        inside=(),
        forward=Way(
            ("(a, b) → (a cos − b sin,  b cos + a sin)",),
            "Pairs in q and k are turned by an angle that grows with the position, so that q · k "
            "depends on how far apart two tokens are.",
        ),
        backward=Way(
            ("(da, db) → (da cos + db sin,  db cos − da sin)",),
            "The transpose of a rotation is the rotation back: no length changes.",
        ),
    ),
    "norm_rotary": Operation(
        "Norm and rotary position",
        "rotary",
        inputs=(("qkv", "dqkv"),),
        outputs=(("rotated", "drotated"),),
        inside=(),
        forward=Way(
            ("x̂ = x / √(mean(x²) + ε) of each head of q and k", "(a, b) → (a cos − b sin, …)"),
            "Each head of q and k is normalized, then turned by an angle that grows with the "
            "position.",
        ),
        backward=Way(
            ("turn back", "dx = (g − x̂ mean(g x̂)) / √(mean(x²) + ε) of each head"),
            "In reverse: the rotation back, then the norm, whose gradient loses its share along x̂.",
        ),
    ),
    "attention": Operation(
        "Attention",
        "attention",
        inputs=(("qkv", "dqkv"),),
        outputs=(("out", "dout"),),
        inside=(("p", "dp"), ("scores", "ds"), ("q", "dq"), ("k", "dk"), ("v", "dv")),
        forward=Way(
            ("s = q kᵀ / √D,  causal", "p = softmax(s)", "out = p v"),
            "Each query looks back at the keys before it and takes a mean of their values, "
            "weighted by how well query and key agree.",
        ),
        backward=Way(
            (
                "dv = pᵀ dout;  dp = dout vᵀ",
                "ds = p (dp − δ),  δ = Σ p dp",
                "dq = ds k / √D;  dk = dsᵀ q / √D",
            ),
            "The weights p of a query sum to 1, so only differences count: the softmax takes the "
            "weighted mean δ away from dp, a correction of rank one.",
        ),
    ),
    "bias_gelu": Operation(
        "GELU",
        "gelu",
        inputs=(("h", "dh"),),
        outputs=(("a", "dy"),),
        inside=(("u", "dh"),),
        forward=Way(
            ("u = h + b", "a = ½ u (1 + tanh(√(2/π) (u + 0.044715 u³)))"),
            "A smooth gate: large inputs pass, negative ones are nearly switched off.",
        ),
        backward=Way(
            ("t = tanh(z(u))", "dh = dy (½ (1 + t) + ½ u (1 − t²) z′(u))", "db += Σ dh"),
            "Each element is on its own: the gradient is multiplied by the curve's slope there.",
        ),
    ),
    "swiglu": Operation(
        "SwiGLU",
        "swiglu",
        inputs=(("h", "dh"),),
        outputs=(("a", "dy"),),
        inside=(("gate", "dgate"), ("up", "dup")),
        forward=Way(
            ("a = g σ(g) u",),
            "A gate g decides how much of the value u passes.",
        ),
        backward=Way(
            ("dg = dy u σ (1 + g (1 − σ))", "du = dy g σ"),
            "A product: each factor's gradient is dy times the other factor; the gate's also "
            "times its slope.",
        ),
    ),
    "cross_entropy": Operation(
        "Softmax and loss",
        "cross_entropy",
        inputs=(("logits", "dlogits"),),
        outputs=(("losses", ""),),
        inside=(),
        forward=Way(
            ("loss = log Σ exp(z) − z[target]",),
            "The loss of a token is minus the logarithm of the probability that the model gave "
            "to it.",
        ),
        backward=Way(
            ("dz = (softmax(z) − onehot(target)) / targets",),
            "Here the gradient begins: it pulls the target up by what it lacks to probability 1, "
            "and pushes every other token down by its probability.",
        ),
    ),
    "adamw": Operation(
        "AdamW",
        "adamw",
        inputs=(),
        outputs=(),
        inside=(),
        forward=Way((), ""),
        backward=Way(
            (
                "g ← c g,  c = min(1, limit / ‖g‖)",
                "m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²",
                "w ← w (1 − η λ) − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)",
            ),
            "m is where the gradient has pointed lately, v how large it has been. Their quotient "
            "is a step of nearly the same size for every weight.",
        ),
    ),
    "muon": Operation(
        "Muon and AdamW",
        "adamw",
        inputs=(),
        outputs=(),
        inside=(),
        forward=Way((), ""),
        backward=Way(
            (
                "g ← c g,  c = min(1, limit / ‖g‖)",
                "matrices in blocks:  m ← μ m + (1 − μ) g;  U S Vᵀ = μ m + (1 − μ) g",
                "w ← w (1 − η λ) − η s U Vᵀ,  s = 0.2 √max(M, K), or √max(1, M / K)",
                "all else:  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²",
                "w ← w (1 − η λ) − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)",
            ),
            "A matrix in a block goes equally far in every direction that its gradients have "
            "lately had: their singular values are made about 1, by products of matrices alone. "
            "All other weights are updated by AdamW.",
        ),
    ),
    "sgd": Operation(
        "Gradient descent",
        "adamw",
        inputs=(),
        outputs=(),
        inside=(),
        forward=Way((), ""),
        backward=Way(
            ("g ← c g,  c = min(1, limit / ‖g‖)", "w ← w (1 − η λ) − η g"),
            "Each weight goes a small step against its gradient.",
        ),
    ),
}
