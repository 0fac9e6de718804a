"""Evaluation of a trained model: how well it predicts text, and how good its stories are.

`evaluator` writes the report; `perplexity`, `choices`, `diversity` and `coherence` are its parts.
"""
