"""The settings of every recipe: steps, optimizer, attention, measuring and saving."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qat_patch import AttnQATConfig, LinearQATConfig
from qat_recipes.memory.optimizers import OptimizerName


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSettings(LinearQATConfig):
    """Linear layers in NVFP4, beside 4-bit attention."""

    calibration_batches: int | None = None
    """Before the first step, measure the input ranges of linear layers on this many of the first batches of each process. null:
    8, or all if the run has fewer, and none with `nvfp4a16`, which rounds no inputs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        number = self.calibration_batches
        if number is not None and (number < 1 or not self.rounds_inputs):
            expected = "at least 1, or null" if self.rounds_inputs else "null with format nvfp4a16, which rounds no inputs"
            raise ValueError(f"settings.linear.calibration_batches: expected {expected}, got {number}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a run trains, measures and saves. A recipe adds its model and its data."""

    output_dir: str
    """Folder of the run: settings.yaml, metrics.jsonl, checkpoint-STEP/ and, at the end, export/."""
    steps: int
    """Optimizer steps of the whole run."""
    batch_size: int
    """Samples per forward pass of one process. One step sees batch_size * accumulation_steps * processes samples."""
    accumulation_steps: int = 1
    """Forward and backward passes per step; their gradients are averaged."""
    attention: Literal["fp4", "original"] = "fp4"
    """The attention to train through: 4-bit, or the model's own (a control run). Both are measured in any case."""
    qat: AttnQATConfig = AttnQATConfig()
    """Which modules are patched, and what is quantized. `qat.spec.preset` sets the grid: this package's (`nvfp4`), or that of a
    server, such as `kv_nvfp4` for the NVFP4 KV caches of vLLM and SGLang, and `sage3` for SageAttention3 (docs/SERVERS.md)."""
    linear: LinearSettings | None = None
    """Linear layers in NVFP4 too, rounded by compressed-tensors and exported packed for vLLM and SGLang (docs/SERVERS.md). null:
    unchanged. The held-out loss is measured with only 4-bit attention, only 4-bit linear layers, both, and neither."""
    calibration_batches: int = 0
    """Before the first step, measure the means of K and Q that are subtracted before quantization (`calibration_shifts`) on this
    many of the first batches of each process; 0: nothing is subtracted."""
    calibration_shifts: tuple[Literal["k_shift", "q_shift"], ...] = ("k_shift", "q_shift")
    """Which means `calibration_batches` measures: of K, of Q, or of both."""
    calibration_exclude: tuple[str, ...] = ()
    """Patterns of patched modules that get no shifts, such as ["*.attn2"] of Wan's image to video if only K is shifted: they
    attend to text and image, whose means differ."""
    distillation: float = 0.0
    """The weight in the loss of the distance to the teacher, which is the starting model with original attention and linear
    layers. 0: only the loss of the task; 1: only the distance; between: a mix. Without adapters the teacher is a second model in
    memory."""
    optimizer: OptimizerName = "adamw"
    """adamw: PyTorch's, with two float32 moments per weight. adamw_8bit: moments of one byte. paged_adamw, paged_adamw_8bit:
    moments that leave the GPU if its memory is short. All but the first come from bitsandbytes."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay of all parameters."""
    fused_optimizer: bool = False
    """Run AdamW as one kernel for all parameters: faster on a GPU."""
    offload_activations: bool = False
    """Keep activations in CPU memory until the backward pass; with gradient checkpointing these are the inputs of each layer.
    Needs a GPU."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights with this decay, and measure and export it; null: none."""
    compile: str | None = None
    """Backend of torch.compile for the repeated blocks of the model, such as inductor; null: nothing is compiled."""
    max_grad_norm: float | None = 1.0
    """Clip the gradients of a step to this norm; null: never."""
    max_skipped_steps: int = 0
    """How many steps with loss or gradients that are not finite a run may skip; one more stops it. Such steps do not change the
    weights; their batches are saved in output_dir/nonfinite."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to zero at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    mixed_precision: Literal["bf16"] | None = None
    """bf16: compute in bfloat16 under autocast. Trained weights are always float32, and so are PyTorch's optimizer states."""
    seed: int = 0
    """Seed of the order of the samples and of all random numbers."""
    deterministic: bool = False
    """Make every run on the same machine bit-equal; some algorithms are slower this way on a GPU. CPU runs always are."""
    eval_every: int = 0
    """Measure the held-out losses before the first step, every N steps and after the last. Must be at least 1 with held-out data
    (`data.eval` or `data.eval_fraction`), and 0 without."""
    checkpoint_every: int = 0
    """Write a checkpoint every N steps and after the last; 0: never."""
    keep_checkpoints: int | None = None
    """Keep only the N newest checkpoints; null: all."""
    resume: str | None = None
    """Resume from a checkpoint: its path, or `latest` for the newest in output_dir (if there is none, the run starts new)."""
    layers_every: int = 0
    """Log the gradient norm of every layer and its error in 4-bit attention every N steps; 0: never."""
    report_to: tuple[str, ...] = ()
    """Trackers of Accelerate that also get the metrics, such as tensorboard or wandb."""

    def __post_init__(self) -> None:
        def need(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"settings.{name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("steps", "batch_size", "accumulation_steps"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("weight_decay", "seed", "eval_every", "checkpoint_every", "max_skipped_steps", "layers_every"):
            need(getattr(self, name) >= 0, name, "0 or more")
        need(0 <= self.distillation <= 1, "distillation", "a number in [0, 1]")
        need(
            self.attention == "fp4" or self.linear is not None or self.distillation < 1,
            "distillation",
            "less than 1 with attention=original, since the model is its own teacher then and learns nothing",
        )
        batches = self.steps * self.accumulation_steps
        if self.linear_batches > batches:
            raise ValueError(
                f"settings.linear.calibration_batches: expected at most the batches of the run ({batches}), got "
                f"{self.linear_batches}"
            )
        need(0 <= self.calibration_batches <= batches, "calibration_batches", f"at most the batches of the run ({batches})")
        shifts = self.qat.spec.rules.options
        need(
            not self.calibration_batches or shifts,
            "calibration_batches",
            f"0 with preset {self.qat.spec.preset}, which has no shifts",
        )
        need(len(self.calibration_shifts) > 0, "calibration_shifts", "k_shift, q_shift or both; for none: calibration_batches=0")
        need(
            self.calibration_batches > 0 or not self.calibration_exclude, "calibration_exclude", "[] without calibration_batches"
        )
        need(self.optimizer == "adamw" or not self.fused_optimizer, "fused_optimizer", f"false with optimizer={self.optimizer}")
        need(self.learning_rate > 0, "learning_rate", "a positive number")
        need(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers in [0, 1)")
        need(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "a positive number or null")
        need(0 <= self.warmup_steps < self.steps, "warmup_steps", f"0 or more, and less than steps ({self.steps})")
        need(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "a number between 0 and 1, or null")
        for name in ("eval_every", "checkpoint_every", "layers_every"):
            need(getattr(self, name) <= self.steps, name, f"at most steps ({self.steps})")
        need(self.keep_checkpoints is None or self.keep_checkpoints >= 1, "keep_checkpoints", "at least 1, or null")
        need(self.keep_checkpoints is None or self.checkpoint_every > 0, "keep_checkpoints", "null without checkpoint_every")

    @property
    def trains_in_turns(self) -> bool:
        """Whether a step trains only one of several parts of the model, so that the others have no gradients."""
        return False

    @property
    def linear_batches(self) -> int:
        """The number of first batches to measure the inputs of linear layers on."""
        if self.linear is None or not self.linear.rounds_inputs:
            return 0
        return self.linear.calibration_batches or min(8, self.steps * self.accumulation_steps)

    @property
    def processes_a_sample(self) -> int:
        """The number of processes that share the tokens of one sample."""
        return 1

    def check_eval(self, has_eval: bool) -> None:
        """For recipes: held-out data and eval_every need each other.

        Raises:
            ValueError: one of them has no effect.
        """
        if has_eval and not self.eval_every:
            raise ValueError(
                "settings.eval_every: expected at least 1, since there is held-out data, got 0; set it, or leave data.eval and "
                "data.eval_fraction out"
            )
        if self.eval_every and not has_eval:
            raise ValueError(f"settings.eval_every: expected 0, since there is no held-out data, got {self.eval_every}")

    def is_due(self, every: int, step: int) -> bool:
        """Whether an action of every `every` steps (0: never) and after the last is due after this step."""
        return every > 0 and (step % every == 0 or step == self.steps)
