"""What a resumed run says of settings that are not its checkpoint's."""

from __future__ import annotations

from mantrans.config import Config
from mantrans.training.resume import changed_settings


def test_changed_settings_of_muon() -> None:
    """A checkpoint from before Muon says nothing of its fields, unless they are used now."""
    now = Config(training={"max_steps": 1}).to_dict()
    before = {k: v for k, v in now["training"].items() if not k.startswith("muon_")}
    assert changed_settings({"training": before}, now, "training") == []
    now["training"]["optimizer"] = "muon"
    assert changed_settings({"training": before}, now, "training") == [
        "training.optimizer 'adamw' → 'muon'",
        "training.muon_momentum None → 0.95",
        "training.muon_scale None → 'match_rms_adamw'",
    ]
