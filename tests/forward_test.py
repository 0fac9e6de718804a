"""To be run by hand, `python tests/forward_test.py`: shapes, loss, and every gradient's norm."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

# Before this folder, where `mantrans` would be the folder of its tests.
sys.path.insert(0, str(Path(__file__).parents[1]))

from mantrans import CustomTransformerWrapper


def main() -> None:
    V, B, T = 4096, 4, 64
    model = CustomTransformerWrapper(
        vocab_size=V,
        d_model=128,
        n_blocks=3,
        n_heads=4,
        d_ffn=512,
        max_seq_len=128,
        dtype=torch.float32,
    )
    ids = torch.randint(0, V, (B, T))
    print("\n".join(f"{key:20} {value}" for key, value in model.get_model_info().items()))

    outputs = model.forward(ids, labels=ids)
    print(f"\nlogits {tuple(outputs['logits'].shape)}, loss {outputs['loss'].item():.4f}")
    print(f"a guess among {V} tokens costs ln {V} = {math.log(V):.4f}\n")

    result = model.train_step(ids, ids, learning_rate=0.0, max_grad_norm=None)
    parameters = dict(model.model.named_parameters())
    print(f"{'parameter':38} {'shape':>14} {'weights':>10} {'gradient':>10}   (L2 norms)")
    for name, gradient in model.model.named_gradients():
        shape = "×".join(map(str, gradient.shape))
        weights = parameters[name].float().norm().item()
        print(f"{name:38} {shape:>14} {weights:10.4f} {gradient.norm().item():10.2e}")
    print(f"{'all':38} {'':>14} {'':>10} {result['grad_norm']:10.2e}")


if __name__ == "__main__":
    main()
