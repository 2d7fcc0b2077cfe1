"""What can be set, once: flags, recipe keys and help all come from the models in this folder.

A field's name is the recipe key (`train.batch_size`) and, with dashes, the flag (`--batch-size`); its
description is the help text; its default stands here and nowhere else.
"""

from __future__ import annotations

from mlx_distill.config.collecting import Choose, CollectConfig, Confinement, CostConfig, PromptsConfig
from mlx_distill.config.comparing import ChatConfig, CompareConfig, JudgeConfig, ReportConfig
from mlx_distill.config.publishing import ExportConfig, FuseConfig, ImportAdapterConfig, PullConfig, ShareConfig
from mlx_distill.config.training import (
    DEFAULT_STUDENT,
    DEFAULT_TOP_K,
    SIZE_PATTERN,
    BenchConfig,
    DoctorConfig,
    LogitsConfig,
    PruneConfig,
    RunsConfig,
    TrainConfig,
    size_in_bytes,
)

__all__ = [
    "DEFAULT_STUDENT",
    "DEFAULT_TOP_K",
    "SIZE_PATTERN",
    "BenchConfig",
    "ChatConfig",
    "Choose",
    "CollectConfig",
    "CompareConfig",
    "Confinement",
    "CostConfig",
    "DoctorConfig",
    "ExportConfig",
    "FuseConfig",
    "ImportAdapterConfig",
    "JudgeConfig",
    "LogitsConfig",
    "PromptsConfig",
    "PruneConfig",
    "PullConfig",
    "ReportConfig",
    "RunsConfig",
    "ShareConfig",
    "TrainConfig",
    "size_in_bytes",
]
