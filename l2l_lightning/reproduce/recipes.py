"""The trained rules that the experiments are about, and how each of them is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

SNAPSHOTS = (10, 200)
"""Meta-epochs (rollouts) after which the study shows its ReLU rule, besides the end, 3,000."""


@dataclass(frozen=True)
class Recipe:
    """A meta-training: a preset, and what differs from it."""

    preset: str
    minutes: float
    """What it takes on two cores, for the time left."""
    arguments: tuple[str, ...] = ()
    """Options of `fit`."""
    snapshots: tuple[int, ...] = ()
    """Numbers of rollouts after which the rule is kept as it is then."""
    start: str | None = None
    """The trained rule that this one goes on from."""


@dataclass(frozen=True)
class Ablation:
    """One setting of the preprocessing ablation."""

    preprocessing: str
    """"log_sign" or "identity"."""
    factor: float
    """p of log_sign; what identity multiplies gradients by."""
    output_scale: float
    unroll: int
    """20 is truncated, 100 the whole rollout."""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        parts = (self.preprocessing, f"{self.factor:g}", f"{self.output_scale:g}", str(self.unroll))
        object.__setattr__(self, "name", f"ablation-{'-'.join(parts)}")

    @property
    def inputs(self) -> str:
        """How gradients enter, in words."""
        if self.preprocessing == "log_sign":
            return f"log and sign, p = {self.factor:g}"
        return "as they are" if self.factor == 1 else f"times {self.factor:g}"

    @property
    def recipe(self) -> Recipe:
        """A short run of the preset `mnist`: the same inner steps for every setting."""
        factor = "p" if self.preprocessing == "log_sign" else "gradient_scale"
        arguments = (
            f"--model.rule.preprocessing={self.preprocessing}",
            f"--model.rule.{factor}={self.factor}",
            f"--model.rule.output_scale={self.output_scale}",
            f"--model.unroll={self.unroll}",
            "--model.num_tasks=1",
            f"--data.num_rollouts={ABLATION_ROLLOUTS}",
            f"--trainer.val_check_interval={ABLATION_ROLLOUTS * 100 // self.unroll // 4}",
            "--model.num_validation_optimizees=8",
            "--collapse.start_patience=100",  # it is the outcome if a setting stays at chance
            "--collapse.patience=100",
        )
        return Recipe("mnist", 0.5, arguments)


ABLATION_ROLLOUTS = 50
ABLATIONS = [
    Ablation(preprocessing, factor, output_scale, unroll)
    for preprocessing, factor in (
        ("identity", 1.0),
        ("identity", 100.0),
        ("identity", 1000.0),
        ("log_sign", 10.0),
    )
    for output_scale in (0.1, 1.0)
    for unroll in (20, 100)
]

RECIPES: dict[str, Recipe] = {
    "lstm-quadratic": Recipe("quadratic", 1.5),
    "lstm-study-quadratic": Recipe("study_quadratic", 1.0),
    "lstm-mnist": Recipe("mnist", 28.0),
    "lstm-mnist-relu": Recipe("mnist_relu", 22.0, snapshots=SNAPSHOTS),
    "lstm-mnist-tanh": Recipe("mnist_tanh", 4.0),
    "lstm-mnist-activations": Recipe("mnist_activations", 8.0),
    "lstm-mnist-mixture": Recipe("mnist_mixture", 20.0, start="lstm-mnist-activations"),
    **{ablation.name: ablation.recipe for ablation in ABLATIONS},
}
"""Every rule by name."""


def snapshot_of(name: str) -> tuple[str, int] | None:
    """The recipe and the number of rollouts that a snapshot's name stands for ("lstm-mnist-relu-200").

    Example:
        >>> snapshot_of("lstm-mnist-relu-200"), snapshot_of("lstm-mnist")
        (('lstm-mnist-relu', 200), None)
    """
    parent, _, rollouts = name.rpartition("-")
    if parent in RECIPES and rollouts.isdigit() and int(rollouts) in RECIPES[parent].snapshots:
        return parent, int(rollouts)
    return None
