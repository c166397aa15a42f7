"""Every setting of a run as flat dataclasses; `arguments.py` reads them from flags and from YAML."""

from tempsamp_fast.config.train import (
    METHODS,
    MODES,
    AlgorithmConfig,
    AttentionCore,
    Config,
    DataConfig,
    LigerLayers,
    Method,
    ModelConfig,
    Phase,
    RolloutConfig,
    Shaping,
    TrainConfig,
    parse_phases,
    parse_range,
)

__all__ = [
    "METHODS",
    "MODES",
    "AlgorithmConfig",
    "AttentionCore",
    "Config",
    "DataConfig",
    "LigerLayers",
    "Method",
    "ModelConfig",
    "Phase",
    "RolloutConfig",
    "Shaping",
    "TrainConfig",
    "parse_phases",
    "parse_range",
]
