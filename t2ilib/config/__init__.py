"""RunConfig: everything that decides a run, as frozen, validated data. Importing it imports no torch.

One section for each stage of a run (model, adapter, data, objective, optimizer, training, evaluation, tracking), and one for the
drawn world. Unknown fields are errors, and values are checked here rather than where they are used; `runfile` makes runs of
what people write, and reports several mistakes together.

Leaves out what only a loaded model can tell: whether a target names layers that it has.
"""

from t2ilib.config.mistakes import ConfigError, check_choice, did_you_mean
from t2ilib.config.run import RunConfig
from t2ilib.config.sections import (
    AdapterSpec,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Section,
    ShapesConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterSpec",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "Section",
    "ShapesConfig",
    "TrackingConfig",
    "TrainingConfig",
    "check_choice",
    "did_you_mean",
]
