"""Decoder-only transformers with a hand-written backward pass."""

from importlib.util import find_spec

if find_spec("kernels") is None or find_spec("kernels.reference") is None:
    # a Hugging Face package bears the name `kernels` too
    found = getattr(find_spec("kernels"), "origin", None)
    raise ImportError(
        f"mantrans needs its own package `kernels`, but `import kernels` finds {found or 'none'}; "
        "put the folder of mantrans first on sys.path, or uninstall the other package"
    )

from mantrans.transformer import CustomTransformer
from mantrans.wrapper import CustomTransformerWrapper

__all__ = ["CustomTransformer", "CustomTransformerWrapper"]
__version__ = "0.1.0"
