"""RunConfig: everything that decides a run, as frozen, validated data. Importing it imports no torch.

One section for each stage of a run (model, adapter, data, objective, optimizer, training, evaluation, tracking), one for how steps are computed, and
one each for a UNet from scratch, a student of the base, pictures of the class and the drawn world. Unknown fields are errors, and values are checked here rather than where they are used; `runfile` makes runs of
what people write, and reports several mistakes together.

Leaves out what only a loaded model can tell: whether a target names layers that it has.
"""

from t2ilib.config.data import DataConfig, PriorConfig, ShapesConfig
from t2ilib.config.drawn import DrawnBy, FinishedAdapter
from t2ilib.config.mistakes import ConfigError, check_choice, did_you_mean
from t2ilib.config.objective import ObjectiveConfig
from t2ilib.config.run import RunConfig
from t2ilib.config.section import Section
from t2ilib.config.sections import (
    AdapterSpec,
    ComputeConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ScratchConfig,
    TrackingConfig,
    TrainingConfig,
)
from t2ilib.config.student import StudentConfig

__all__ = [
    "AdapterSpec",
    "ComputeConfig",
    "ConfigError",
    "DataConfig",
    "DrawnBy",
    "EvaluationConfig",
    "FinishedAdapter",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PriorConfig",
    "RunConfig",
    "ScratchConfig",
    "Section",
    "ShapesConfig",
    "StudentConfig",
    "TrackingConfig",
    "TrainingConfig",
    "check_choice",
    "did_you_mean",
]
