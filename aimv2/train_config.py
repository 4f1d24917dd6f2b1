"""A whole run as one dataclass, and what must fit together in it."""

from dataclasses import dataclass, field, replace

from aimv2.data.loader import DataConfig
from aimv2.engine import EngineConfig
from aimv2.evals.in_loop import FrozenEvaluation
from aimv2.evals.shapes_captions import ShapesCaptions
from aimv2.evals.validation import ValidationLoss
from aimv2.init_from import InitFrom
from aimv2.objectives.aimv2 import AIMv2Config
from aimv2.objectives.distill import DistillConfig
from aimv2.objectives.lit import LiTObjectiveConfig
from aimv2.optim import OptimConfig

Objective = AIMv2Config | DistillConfig | LiTObjectiveConfig
EvalConfig = ValidationLoss | ShapesCaptions | FrozenEvaluation


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """A whole run. `configs/*.py` return one; the command line changes fields by `key.sub=value`."""

    objective: Objective
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig
    steps: int
    out: str
    init_from: InitFrom | None = None  # weights to begin with; a checkpoint of this run's own goes before
    seed: int = 0
    save_every: int = 1000
    keep: int = 2  # newest checkpoints
    log_every: int = 10
    evals: list[EvalConfig] = field(default_factory=list)
    wandb: str | None = None  # project

    def __post_init__(self):
        self.objective.check(self.data)
        if self.init_from is None and getattr(self.objective, "needs_weights", False):
            raise ValueError(
                f"init_from is None, but {type(self.objective).__name__} trains on top of a trained image tower: "
                "expected init_from.source, an export or another checkpoint of one"
            )
        if hasattr(self.objective, "check_engine"):
            self.objective.check_engine(self.engine.batch_size, self.engine.zero_stage)
        if self.data.validation is None and not all(isinstance(e, FrozenEvaluation) for e in self.evals):
            raise ValueError("data.validation is None, but evals need it: expected a source, or no evals")
        names = [e.name for e in self.evals]
        if len(set(names)) < len(names):
            raise ValueError(f"evals {', '.join(names)}: expected different names, as label=... gives")
        for e in self.evals:
            if isinstance(e, ShapesCaptions) and not hasattr(self.objective, "decoder"):
                raise ValueError(f"evals: {e.name} needs a decoder, which {type(self.objective).__name__} has not")
            if isinstance(e, ShapesCaptions):
                e.check(self.objective.vision)
            if isinstance(e, FrozenEvaluation):
                e.check(self.objective.vision.depth, has_text=hasattr(self.objective, "text"))
        least = {"steps": 1, "save_every": 1, "log_every": 1, "seed": 0, "keep": 2}  # one checkpoint may be damaged
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} {getattr(self, name)}: expected {value} or more")

    @property
    def own_size(self) -> DataConfig:
        """The data at the size of the exported encoder's images; those of a teacher may be larger."""
        transform = replace(self.data.transform, image_size=self.objective.vision.image_size)
        return replace(self.data, transform=transform)
