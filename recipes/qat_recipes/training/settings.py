"""What every recipe can set: steps, optimizer, attention, measuring and saving."""

from __future__ import annotations

import dataclasses
from typing import Literal

from qat_patch import AttnQATConfig, LinearQATConfig
from qat_recipes.memory.optimizers import OptimizerName


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSettings(LinearQATConfig):
    """Linear layers in NVFP4, beside 4-bit attention."""

    calibration_batches: int | None = None
    """Before the first step, measure the range of the inputs of linear layers on so many of the first batches of each process;
    null: 8, or all if the run has fewer, and none with `nvfp4a16`, which rounds no inputs."""

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
    """Samples in a forward pass of one process. One step sees batch_size * accumulation_steps * processes samples."""
    accumulation_steps: int = 1
    """Forward and backward passes whose gradients are averaged into one step."""
    attention: Literal["fp4", "original"] = "fp4"
    """Attention that the steps train through: 4-bit, or the model's own (a control run). Both are measured either way."""
    qat: AttnQATConfig = AttnQATConfig()
    """What is patched and what is quantized. `qat.spec.preset` says on whose grid: this package's (`nvfp4`), or that of a server,
    such as `kv_nvfp4` for the NVFP4 KV caches of vLLM and SGLang, and `sage3` for SageAttention3 (docs/SERVERS.md)."""
    linear: LinearSettings | None = None
    """Linear layers in NVFP4 too, rounded by compressed-tensors and exported packed for vLLM and SGLang (docs/SERVERS.md); null:
    they stay as they are. The held-out loss is measured with each of the two switched off, with both, and with none."""
    calibration_batches: int = 0
    """Before the first step, measure the mean keys that are subtracted before quantization (`k_shift`) on so many of the first
    batches of each process; 0: nothing is subtracted."""
    calibration_exclude: tuple[str, ...] = ()
    """Patterns of patched modules that get no `k_shift`, such as ["*.attn2"] of Wan's image to video, which attends to text and
    to an image in one call."""
    distillation: float = 0.0
    """How much the loss is the distance to the starting weights with original attention (and linear layers), the teacher: 0 is
    the loss of the task alone, 1 the distance alone, in between they are mixed. Without adapters the teacher is a second model in
    memory."""
    optimizer: OptimizerName = "adamw"
    """adamw: PyTorch's, with two float32 moments a weight. adamw_8bit: moments of one byte. paged_adamw, paged_adamw_8bit:
    moments that leave the GPU when its memory is short. All but the first are those of bitsandbytes."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    weight_decay: float = 0.01
    """Decoupled weight decay, of all parameters."""
    fused_optimizer: bool = False
    """AdamW as one kernel for all parameters: faster on a GPU."""
    offload_activations: bool = False
    """Keep what the backward pass needs in the memory of the CPU until then; with gradient checkpointing that is the input of
    each layer. Needs a GPU."""
    ema_decay: float | None = None
    """Keep an exponential moving average of what is trained, with this decay, and measure and export it; null: none."""
    compile: str | None = None
    """Backend of torch.compile for the repeated blocks of the model, such as inductor; null: nothing is compiled."""
    max_grad_norm: float | None = 1.0
    """Clip the gradients of a step to this norm; null: never."""
    max_skipped_steps: int = 0
    """Steps whose loss or gradients are not finite leave the weights as they are. So many of them may be in a run; one more
    stops it. The batches of each are saved in output_dir/nonfinite."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: as it is, or falling to zero at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    mixed_precision: Literal["bf16"] | None = None
    """Compute in bfloat16 under autocast; what is trained is float32 either way, and so are optimizer states."""
    seed: int = 0
    """Seeds the order of the samples and all random numbers."""
    deterministic: bool = False
    """Give the same bits in every run on the same machine; some algorithms are slower so on a GPU. CPU runs always do."""
    eval_every: int = 0
    """Measure the held-out losses before the first step, every so many steps and after the last. At least 1 with held-out data
    (`data.eval` or `data.eval_fraction`), and 0 without any."""
    checkpoint_every: int = 0
    """Write a checkpoint every so many steps and after the last; 0: never."""
    keep_checkpoints: int | None = None
    """Keep only the newest so many checkpoints; null: all."""
    resume: str | None = None
    """Go on from a checkpoint: `latest` of output_dir, where a run starts anew if nothing has been saved, or its path."""
    layers_every: int = 0
    """Log the gradient norm of every layer and the error of 4-bit attention in it every so many steps; 0: never."""
    report_to: tuple[str, ...] = ()
    """Trackers of Accelerate that get the metrics too, such as tensorboard or wandb."""

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
            f"0 with preset {self.qat.spec.preset}, which has no K shifts",
        )
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
        """Whether a step trains one of several parts of the model, so that the others have no gradients."""
        return False

    @property
    def linear_batches(self) -> int:
        """How many of the first batches the inputs of linear layers are measured on."""
        if self.linear is None or not self.linear.rounds_inputs:
            return 0
        return self.linear.calibration_batches or min(8, self.steps * self.accumulation_steps)

    @property
    def processes_a_sample(self) -> int:
        """Over how many processes the tokens of one sample are split."""
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
        """Whether what is done every so many steps (0: never) and after the last one is to be done after this step."""
        return every > 0 and (step % every == 0 or step == self.steps)
