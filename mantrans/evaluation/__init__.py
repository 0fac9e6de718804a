"""What a trained model is worth: how well it predicts text, and how well it tells a story.

`evaluator` makes the report; `perplexity`, `diversity` and `coherence` are its three parts.
"""
