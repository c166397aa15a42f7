"""Every setting of a run as flat dataclasses, a file per section; `arguments.py` reads them from flags and from YAML.

Ranges are checked where a section is made. Nothing here knows what a setting does: that is told where it is used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tempsamp_fast.config.algorithm import AlgorithmConfig, Shaping
from tempsamp_fast.config.data import DataConfig
from tempsamp_fast.config.model import AttentionCore, LigerLayers, ModelConfig
from tempsamp_fast.config.phases import METHODS, MODES, Method, Phase, parse_phases
from tempsamp_fast.config.rollout import RolloutConfig
from tempsamp_fast.config.setting import parse_range
from tempsamp_fast.config.train import TrainConfig, prompts_per_row, prompts_per_step


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig
    model: ModelConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig
    train: TrainConfig

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Settings by section, ready for JSON."""
        return dataclasses.asdict(self)
