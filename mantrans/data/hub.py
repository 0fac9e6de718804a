"""Is the Hugging Face hub there? Asked once, within seconds, before its libraries are.

Left alone, those libraries try again for half a minute and then fail in many words. Whoever wants
something from the hub asks here first and goes to the cache when the answer is no.
"""

from __future__ import annotations

import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 6.0
_YES = {"1", "on", "yes", "true"}


def reachable() -> bool:
    """Whether anything answers at the hub's address; proxies and HF_ENDPOINT are respected."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in _YES:
        return False
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            with urllib.request.urlopen(request, timeout=SECONDS):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # it answered, if only to complain
        except (OSError, ValueError):
            pass

    if not address.startswith(("https://", "http://")):
        return False
    # A thread, since a name server that does not answer is not bound by urlopen's timeout.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return bool(answers)


@contextmanager
def offline() -> Iterator[None]:
    """Inside, the hub's libraries look into their cache only, and do not try again and again."""
    kept = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by the libraries when first imported
    modules: list[Any] = [
        module
        for name in ("huggingface_hub.constants", "datasets.config")
        if hasattr(module := sys.modules.get(name), "HF_HUB_OFFLINE")
    ]
    settings = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, setting in zip(modules, settings, strict=True):
            module.HF_HUB_OFFLINE = setting
        if kept is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = kept
