"""Ranks that share a machine's memory."""

from __future__ import annotations

import pytest

from mantrans.config import Config
from mantrans.errors import ConfigError
from mantrans.training import room


def test_require_memory_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a machine asks for all of them, at the edge; the others do not ask."""
    config = Config.from_dict({"training": {"max_steps": 1, "device": "cpu"}})
    monkeypatch.setattr(room, "free_memory", lambda device: 2**62)
    alone = room.require_memory(config, 300).bytes
    tokens = config.training.sequences_per_step * (config.sequence_length + 1) * 5 * 8
    all_three = 3 * (alone - tokens) + tokens
    monkeypatch.setattr(room, "free_memory", lambda device: all_three)
    assert room.require_memory(config, 300, processes=3).bytes == alone
    monkeypatch.setattr(room, "free_memory", lambda device: all_three - 1)
    with pytest.raises(ConfigError, match="expected a step on 3 processes that fits into the "):
        room.require_memory(config, 300, processes=3)
    room.require_memory(config, 300, processes=2)
    monkeypatch.setattr(room, "free_memory", lambda device: 0)
    room.require_memory(config, 300, processes=0)
