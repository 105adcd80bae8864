"""Settings as frozen dataclasses: what is quantized, how it is calibrated, how images are sampled.

Every field carries its unit or range; `__post_init__` refuses what cannot work, with the caller's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vqlib.system.settings import Settings, as_seed

BITS_TO_K_D = {2: (256, 4), 3: (64, 2), 4: (256, 2)}  # bits per weight = log2(k) / d
PRODUCTS = ("float32", "tf32", "bfloat16")  # of a model's matrix products and convolutions
LayerRules = tuple[tuple[str, int, int], ...]
Patterns = tuple[str, ...]
CODEBOOK_TYPES = ("float32", "float16", "bfloat16")
RATIO_STARTS = ("equal", "distance", "least-squares", "leading")
OTHER_TRAJECTORIES = 1000  # from a calibration's seed to that of its last stage


class _Guided:
    """Classifier-free guidance, shared by what calibrates and what samples."""

    @property
    def guided(self) -> bool:
        """Whether unconditional halves take part: a scale of exactly 1 is the conditional model alone."""
        return self.guidance_scale != 1.0


@dataclass(frozen=True)
class VQConfig(Settings):
    """How weights become codes: `k` codewords of length `d`, `candidates` n of them offered to each sub-vector.

    Give `bits` alone (2, 3, 4), or `k` and `d`; `bits` is then log2(k) / d. `codebook_scope` is what shares one codebook: a
    layer, a block, or the whole model (then each layer keeps a scale of its own). `assignment`: the candidates are the
    codewords nearest to the weights, or those of error feedback, which needs the second moments of the layers' inputs.
    `layers`: (pattern, k, d), as the shell's, for layers that take other codes; the first that fits a layer's name holds.
    `full_precision`: patterns of layers that are left as they are.
    """

    bits: float | None = None
    d: int | None = None
    k: int | None = None
    candidates: int = 3  # n, 1 … k
    ratio_start: str = "equal"  # all 1/n; what each of `RATIO_STARTS` does is told by `find_candidates`
    codebook_scope: str = "layer"
    kmeans_iterations: int = 100
    assignment: str = "nearest"  # or "error-feedback"
    codebook_dtype: str = "float32"  # as stored, "float16" or "bfloat16"; they are trained in float32
    layers: LayerRules = ()
    full_precision: Patterns = ()

    def _check(self):
        if (self.k is None) != (self.d is None):
            raise ValueError(f"k={self.k} and d={self.d}: give both or neither")
        if self.k is None:
            bits = 2 if self.bits is None else self.bits
            if bits not in BITS_TO_K_D:
                raise ValueError(f"bits={bits} has no default codebook; give k and d (known: {sorted(BITS_TO_K_D)})")
            k, d = BITS_TO_K_D[bits]
            object.__setattr__(self, "k", k)
            object.__setattr__(self, "d", d)
        for pattern, k, d in (("", self.k, self.d), *self.layers):
            where = f" ({pattern})" if pattern else ""
            if d < 1 or not 2 <= k <= 65536:
                raise ValueError(f"k={k}, d={d}: k must be 2 … 65536 and d at least 1{where}")
            if not 1 <= self.candidates <= k:
                raise ValueError(f"candidates={self.candidates} is outside 1 … k={k}{where}")
        bits = math.log2(self.k) / self.d
        if self.bits is not None and not math.isclose(self.bits, bits):
            raise ValueError(f"bits={self.bits} but k={self.k} and d={self.d} give log2(k)/d = {bits:.4g}")
        object.__setattr__(self, "bits", int(bits) if bits == int(bits) else bits)
        self._one_of("ratio_start", RATIO_STARTS)
        self._one_of("assignment", ("nearest", "error-feedback"))
        self._one_of("codebook_dtype", CODEBOOK_TYPES)
        self._one_of("codebook_scope", ("layer", "block", "model"))
        self._positive("kmeans_iterations")

    def for_layer(self, name: str) -> VQConfig:
        """The settings of one layer: k and d of the first of `layers` that fits its dotted name, else of all."""
        k, d = next(((k, d) for pattern, k, d in self.layers if fnmatchcase(name, pattern)), (self.k, self.d))
        return self.replace(k=k, d=d, bits=None, layers=(), full_precision=())

    def takes(self, name: str) -> bool:
        """Whether the layer of that dotted name is quantized."""
        return not any(fnmatchcase(name, pattern) for pattern in self.full_precision)

    def require_used(self, names: Iterable[str]) -> None:
        """Raises ValueError naming a pattern that fits none of the layers."""
        names = list(names)
        for pattern in (*self.full_precision, *(pattern for pattern, _, _ in self.layers)):
            if names and not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"pattern {pattern!r} fits none of the {len(names)} layers, {names[0]} the first")


@dataclass(frozen=True)
class CalibrationConfig(Settings, _Guided):
    """One calibration run: zero-data inputs, loss, optimizer, hardening. Recipes are in `RECIPES`; see `recipe()`."""

    iterations: int = 500  # optimizer steps
    batch_size: int = 16  # images on the trajectory; doubled by their unconditional halves where guided
    steps: int = 50  # timesteps of a trajectory
    guidance_scale: float = 1.5
    inputs: str = "trajectory"  # or "noise": Gaussian x_t at random timesteps, the control experiment
    timestep_order: str = "staggered"  # each image at its own timestep; "sequential": all at the same one
    block_inputs: str = "full"  # full-precision activations for every block; "student": its own, detached; "end-to-end"
    loss_at: str = "block"  # every block's output; "output": the model's output only (needs block_inputs="end-to-end");
    # "guided": what guidance makes of the output's two halves, which is what sampling takes its steps by
    path: str = "teacher"  # whose x_t the student is given; "student": its own, aimed at the teacher's signal
    activation_checkpointing: bool = False  # end to end: blocks run twice, their activations are not kept
    block_loss: str = "sum"  # over an image's tokens and channels, the squared norm of Eq. 8; "mean": as the release
    lambda_d: float = 1.0  # weight of the block loss, Eq. 8
    lambda_r: float = 1.0  # weight of the ratio loss, Eq. 9
    ratio_loss: str = "absolute"  # Eq. 9, 1 − |2r − 1|; "quadratic": n · r(1 − r)
    ratio_loss_when: str = "always"  # "rising": only in steps where it is above its running minimum; "never"
    freeze_rule: str = "threshold"  # "schedule": the most decided sub-vectors of each layer first, by a timetable
    freeze_above: float = 0.99  # threshold: a sub-vector whose largest ratio passes this takes that candidate for good
    freeze_from: float = 0.2  # schedule: share of the run before which nothing is frozen …
    freeze_until: float = 0.7  # … and after which all is, so that the rest of the run trains codebooks alone
    train_codebooks: str = "always"  # "frozen": once 99 % of the layer is frozen; "never"
    train_biases: bool = True
    optimizer: str = "rmsprop"  # or "adam"
    smoothing: float = 0.99  # RMSprop's alpha, Adam's beta2
    lr_ratios: float = 5e-2
    lr_codebooks: float = 1e-4  # codebooks, biases and layer scales
    lr_latents: float = 0.0  # of the latents that move assignments in distillation, in their layer's RMS; 0: none move
    lr_decay: str = "constant"  # "cosine": to zero over the run
    products: str = "float32"  # "tf32", or "bfloat16" by autocast; codebooks, ratios, optimizer and loss stay float32
    seed: int = 0
    checkpoint_every: int = 100  # iterations; 0: only at the end

    def _check(self):
        as_seed("seed", self.seed)
        self._positive("iterations", "batch_size", "steps", "guidance_scale", "lr_ratios", "lr_codebooks")
        self._one_of("inputs", ("trajectory", "noise"))
        self._one_of("timestep_order", ("staggered", "sequential"))
        self._one_of("block_inputs", ("full", "student", "end-to-end"))
        self._one_of("loss_at", ("block", "output", "guided"))
        self._one_of("block_loss", ("mean", "sum"))
        self._one_of("path", ("teacher", "student"))
        self._one_of("ratio_loss", ("absolute", "quadratic"))
        self._one_of("ratio_loss_when", ("always", "rising", "never"))
        self._one_of("train_codebooks", ("always", "frozen", "never"))
        self._one_of("optimizer", ("rmsprop", "adam"))
        self._one_of("lr_decay", ("constant", "cosine"))
        self._one_of("freeze_rule", ("threshold", "schedule"))
        self._one_of("products", PRODUCTS)
        if not 0.0 <= self.freeze_from < self.freeze_until <= 1.0:
            raise ValueError(
                f"freeze_from={self.freeze_from}, freeze_until={self.freeze_until}: need 0 ≤ from < until ≤ 1"
            )
        if self.checkpoint_every < 0 or min(self.lambda_d, self.lambda_r) < 0 or not 0.0 <= self.smoothing < 1.0:
            given = f"checkpoint_every={self.checkpoint_every}, lambda_d={self.lambda_d}, lambda_r={self.lambda_r}"
            raise ValueError(f"{given}, smoothing={self.smoothing}: need ≥ 0, and smoothing below 1")
        if not 0.5 < self.freeze_above <= 1.0:
            raise ValueError(f"freeze_above={self.freeze_above} is outside (0.5, 1]")
        if self.on_output and self.block_inputs != "end-to-end":
            raise ValueError(
                f"loss_at={self.loss_at!r} follows the student end to end: it needs block_inputs='end-to-end'"
            )
        if self.lr_latents < 0 or (self.lr_latents and not self.on_output):
            raise ValueError(f"lr_latents={self.lr_latents}: need ≥ 0, and loss_at='output' or 'guided' above it")
        if self.path == "student" and (not self.on_output or self.inputs != "trajectory"):
            given = f"loss_at={self.loss_at!r}, inputs={self.inputs!r}"
            raise ValueError(f"path='student' needs loss_at='output' or 'guided' and inputs='trajectory', not {given}")

    @property
    def on_output(self) -> bool:
        """Whether the model's output is compared, and not that of its blocks."""
        return self.loss_at != "block"


@dataclass(frozen=True)
class SamplingConfig(Settings, _Guided):
    """Sampling steps (DDPM's, or Euler's of a flow), classifier-free guidance, how many images share a forward pass, and in how many bits it is made."""

    steps: int = 50
    guidance_scale: float = 1.5
    guidance_channels: int | None = None  # latent channels that are guided; None: as by the model's own sampler
    batch_size: int = 100
    products: str = "float32"  # of the transformer, "tf32", or "bfloat16" by autocast; latents are decoded in float32

    def _check(self):
        self._positive("steps", "guidance_scale", "batch_size")
        if self.guidance_channels is not None:
            self._positive("guidance_channels")
        self._one_of("products", PRODUCTS)


@dataclass(frozen=True)
class Recipe:
    """Codes and calibration that belong together, and the figure they must give."""

    vq: VQConfig
    calibration: CalibrationConfig
    distillation: CalibrationConfig | None = None  # what follows, on the model's output
    expected: str = ""  # on the bundled model at 2 bits, where the README's tables have it

    def codes(self, base: VQConfig, **changes) -> VQConfig:
        """This recipe's candidates, how they are found and where ratios start, for the k, d, scope and k-means of `base`."""
        own = {name: getattr(self.vq, name) for name in ("candidates", "ratio_start", "assignment")}
        return base.replace(**(own | changes))

    def run(self, base: CalibrationConfig, **changes) -> CalibrationConfig:
        """This recipe's calibration with the length, batch, steps, guidance and checkpoints of `base`, but those that it sets itself."""
        return _along(self.calibration, base, changes)

    def last(self, base: CalibrationConfig, **changes) -> CalibrationConfig:
        """The last stage, after the calibration `base`: as `run` has it, from another seed than its. ValueError where there is none."""
        if self.distillation is None:
            raise ValueError(f"the recipe does not distill; of {sorted(RECIPES)} these do: {_distilling()}")
        return _along(self.distillation, base, {"seed": base.seed + OTHER_TRAJECTORIES} | changes)


def _along(own: CalibrationConfig, base: CalibrationConfig, changes: dict) -> CalibrationConfig:
    default = CalibrationConfig()
    names = ("iterations", "batch_size", "steps", "guidance_scale", "checkpoint_every")
    sizes = {name: getattr(base, name) for name in names if getattr(own, name) == getattr(default, name)}
    return own.replace(**(sizes | changes))


RECIPES = {
    # The paper: ratios at 1/n, Eq. 8–10, full-precision block inputs, codebooks and ratios together.
    "paper": Recipe(VQConfig(), CalibrationConfig(), expected="FD-5k (fashion) 1.29, full precision 0.41"),
    # The authors' later code release, where it differs from the paper.
    "release": Recipe(
        VQConfig(candidates=2, ratio_start="distance"),
        CalibrationConfig(
            batch_size=4,
            guidance_scale=4.0,
            timestep_order="sequential",
            block_inputs="end-to-end",
            block_loss="mean",
            ratio_loss="quadratic",
            ratio_loss_when="rising",
            train_codebooks="frozen",
            smoothing=0.9,
        ),
        expected="FD-500 (fashion) 3.62 ± 1.05 over 3 seeds, full precision 0.53",
    ),
    # What was found best here: candidates of error feedback, the first one trusted, and no ratio loss at all. The most
    # decided sub-vectors are frozen by a timetable while the block loss still moves the others, and the codebooks train
    # on alone at the end.
    "best": Recipe(
        VQConfig(candidates=2, ratio_start="leading", assignment="error-feedback"),
        CalibrationConfig(ratio_loss_when="never", freeze_rule="schedule", lr_codebooks=3e-4, lr_decay="cosine"),
        CalibrationConfig(
            iterations=1000,
            block_inputs="end-to-end",
            loss_at="output",
            path="student",
            lr_latents=6e-3,
            ratio_loss_when="never",
            lr_decay="cosine",
            seed=OTHER_TRAJECTORIES,
        ),
        expected="FD-5k (fashion) 0.66, full precision 0.41",
    ),
}


def recipe(name: str, **changes) -> CalibrationConfig:
    """The calibration settings of a named recipe, with changes; raises ValueError on an unknown name."""
    return named(name).calibration.replace(**changes)


def recipe_distillation(name: str, **changes) -> CalibrationConfig:
    """The settings of a recipe's last stage, on the model's output; ValueError on an unknown name and where it has none."""
    found = named(name).distillation
    if found is None:
        raise ValueError(f"recipe {name!r} does not distill; of {sorted(RECIPES)} these do: {_distilling()}")
    return found.replace(**changes)


def _distilling() -> list[str]:
    return sorted(name for name, known in RECIPES.items() if known.distillation)


def recipe_vq(name: str, bits: float | None = 2, **changes) -> VQConfig:
    """The codes that a recipe expects, at `bits` (2, 3, 4; None where k and d are given): candidates, starting ratios, assignment.

    Of `best` that is error feedback, so that `quantize` needs `hessians`. ValueError on an unknown name or values that disagree.
    """
    return named(name).vq.replace(**({"bits": bits, "k": None, "d": None} | changes))


def named(name: str) -> Recipe:
    """The recipe of that name; raises ValueError on an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not one of {sorted(RECIPES)}")
    return RECIPES[name]
