"""QATCallback: measuring, calibrating and exporting, as in the recipes, for Transformers' Trainer and the trainers of TRL.

    from qat_recipes.callback import QATCallback

    trainer.add_callback(QATCallback(trainer, calibration_batches=8, export_dir="qwen3-fp4"))

Importing this module imports transformers, but not TRL.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qat_patch import LinearHandle, PatchHandle, calibrate, export_checkpoint, get_linear_handle
from qat_patch.checkpoint.adapters import adapter_owner
from qat_patch.checkpoint.record import attention_in_force
from qat_patch.layer import SHIFTS, Shifts
from qat_patch.metadata import AttentionMetadata
from qat_patch.patch import require_handle
from qat_patch.servers import check_servable

_STATE = "qat_patch"
"""The key of `TrainerState.stateful_callbacks`, which every checkpoint of the Trainer holds."""
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that collators pass with packed samples; models pass them on to attention without naming them."""
_NO_MEASUREMENTS = ("_runtime", "_per_second", "_model_preparation_time")
_EXPORT_OPTIONS = inspect.signature(export_checkpoint).parameters.keys() - {"model", "folder"}


class QATCallback(TrainerCallback):
    """Measures in both attentions, calibrates, keeps K and Q shifts in checkpoints, and exports.

    - **Before the first step** it checks that the model is patched, and calibrates if `calibration_batches` is set. This includes
      linear layers that round their inputs (`quantize_linears`): their ranges must be measured here or before.
    - **Each evaluation** is repeated in the original attention, on the same batches. The trainer's `eval_loss` is 4-bit
      attention; the callback adds `eval_original_loss` and every other number that the trainer measures (such as
      `eval_original_reward`), without quantized linear layers. `metric_for_best_model` may be one of them. The random numbers of
      the training do not change. GRPOTrainer samples again in each attention.
    - **Checkpoints** hold the attention, the shifts and the scales of linear layers. A resumed run (`resume_from_checkpoint`)
      gets these back, and is refused if the model is patched or quantized in another way.
    - **After the last step**, and after `load_best_model_at_end`, the model is exported.

    Args:
        trainer: the trainer. Its model must be patched before it trains. Make a trainer with a reference model before the
            patch; see recipes/examples.
        calibration_batches: how many of the first training batches of each process to measure the means of K and Q on (as
            `qat_patch.calibrate`, with presets that have shifts), and the input ranges of quantized linear layers. 0: measure
            nothing, keep the present values. The batches must hold token ids. Those of GRPOTrainer do not: call `calibrate`
            before its training.
        calibration_exclude: patterns of patched modules that get no shifts.
        export_dir: the folder to export to, which must not exist; None: no export.
        export_options: passed on to `qat_patch.export_checkpoint`, such as dtype="bfloat16", server="vllm" or
            merge_adapters=False. The default tokenizer is the trainer's.

    Raises:
        ValueError: this is not a trainer, an argument does not fit, or the model is sharded (FSDP, DeepSpeed), so it cannot be
            exported from here. When the training begins: the model is not patched, the checkpoint was trained with other
            attention or linear layers, the input ranges of these were not measured, the batches cannot be used for calibration,
            or the server cannot run the model.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        calibration_batches: int = 0,
        calibration_exclude: Sequence[str] = (),
        export_dir: str | Path | None = None,
        **export_options: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise ValueError(f"QATCallback: expected a Trainer of transformers or TRL, got {type(trainer).__name__}")
        if not isinstance(calibration_batches, int) or calibration_batches < 0:
            raise ValueError(f"QATCallback: calibration_batches: expected a number from 0 up, got {calibration_batches!r}")
        if calibration_exclude and not calibration_batches:
            raise ValueError("QATCallback: calibration_exclude has no effect without calibration_batches; leave it out")
        if unknown := sorted(export_options.keys() - _EXPORT_OPTIONS):
            raise ValueError(
                f"QATCallback: export_checkpoint has no {', '.join(unknown)}; it has {', '.join(sorted(_EXPORT_OPTIONS))}"
            )
        if export_options and export_dir is None:
            raise ValueError(f"QATCallback: {', '.join(sorted(export_options))}: has no effect without export_dir; leave it out")
        if export_dir is not None and Path(export_dir).exists():
            raise ValueError(f"QATCallback: export_dir: {export_dir} exists; choose another folder or remove it")
        if export_dir is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise ValueError(
                "QATCallback: export_dir: expected a model that is whole in each process, got one that FSDP or DeepSpeed shards; "
                "leave it out, save with trainer.save_model, and export what from_pretrained and patch_model make of that"
            )
        self.trainer, self.export_dir, self.export_options = trainer, export_dir, export_options
        self.calibration_batches, self.calibration_exclude = calibration_batches, calibration_exclude
        self.measured: dict[str, float] = {}
        """The last held-out losses, for the model card of the export."""

    @property
    def handle(self) -> PatchHandle:
        """The patch of the trainer's model."""
        return require_handle(self.trainer.model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the patch. Use the shifts of a checkpoint, or calibrate."""
        handle = self.handle
        handle.check_in_force("QATCallback")
        if state.global_step:
            self._go_on(handle, state)
        elif self.calibration_batches:
            self._calibrate(handle)
        metadata, shifts = _in_force(handle)
        linears = get_linear_handle(self.trainer.model)
        state.stateful_callbacks[_STATE] = {
            "attention": metadata.to_dict(),
            **{which: {name: shift.tolist() for name, shift in found.items()} for which, found in shifts.items()},
            "linears": None if linears is None else _scales(linears),
        }
        if server := self.export_options.get("server"):
            # Check it now, not at the end of the training.
            alone = not self.export_options.get("merge_adapters", True) and adapter_owner(self.trainer.model)
            adapters = next(iter(alone.peft_config.values())) if alone else None
            auto_enable = self.export_options.get("auto_enable", False)
            check_servable(server, handle, adapters=adapters, auto_enable=auto_enable, linears=linears)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure the same in original attention, log it, and add it to the result of `evaluate`."""
        trainer, metrics = self.trainer, {} if metrics is None else metrics
        # "eval", followed by the name of the dataset if there are several.
        prefix = next((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), "eval")
        devices = [args.device] if args.device.type == "cuda" else []
        linears = get_linear_handle(trainer.model)
        unquantized = contextlib.nullcontext() if linears is None else linears.disabled()
        with self.handle.disabled(), unquantized, torch.random.fork_rng(devices), _nobody_listening(trainer) as log_history:
            output = trainer.evaluation_loop(
                eval_dataloader,
                description="Evaluation in original attention",
                prediction_loss_only=True if trainer.compute_metrics is None else None,
                metric_key_prefix=prefix,
            )
            # The trainers of TRL add their gathered numbers here, and reset them.
            trainer.log(output.metrics)
        found = {
            f"{start}_original_{key.removeprefix(start + '_')}": value
            for record in log_history
            for key, value in record.items()
            if not key.endswith(_NO_MEASUREMENTS) and (start := _beginning(key, prefix, "eval"))
        }
        trainer.log(dict(found))
        metrics.update(found)
        self.measured |= {key: value for key, value in metrics.items() if "_loss" in key}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Export."""
        trainer = self.trainer
        if self.export_dir is None:
            return
        chosen = ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")
        training = {"trainer": type(trainer).__name__, "steps": state.global_step}
        training |= {name: getattr(args, name) for name in chosen}
        if trainer.is_world_process_zero():
            with _without_autocast(trainer) as model:
                known = {"tokenizer": trainer.processing_class, "training": training, "metrics": self.measured}
                export_checkpoint(model, self.export_dir, **known | self.export_options)
        # If a process ended while another still exports, it would take that one down.
        trainer.accelerator.wait_for_everyone()

    def _go_on(self, handle: PatchHandle, state: TrainerState) -> None:
        """Restore the shifts and scales of a checkpoint, after checking that it fits."""
        kept = state.stateful_callbacks.get(_STATE)
        if kept is None:
            raise ValueError(
                "QATCallback: the checkpoint to resume from was written without this callback, so its shifts are not known; "
                "resume without the callback from a model that was loaded from that checkpoint, or start again"
            )
        then, (now, _) = AttentionMetadata.from_dict(kept["attention"]), _in_force(handle)
        if different := sorted(name for name in then.specs | now.specs if then.specs.get(name) != now.specs.get(name)):
            expected, got = (specs.get(different[0], "original attention") for specs in (then.specs, now.specs))
            raise ValueError(
                f"QATCallback: the checkpoint to resume from was trained with other attention in {len(different)} modules, such "
                f"as {different[0]}: expected {expected}, got {got}; patch the model as it was"
            )
        linears, scales = get_linear_handle(self.trainer.model), kept.get("linears")
        quantized = {} if linears is None else linears.layers
        if different := sorted((scales or {}).keys() ^ quantized.keys()):
            expected, found = ("quantized" if different[0] in x else "original" for x in (scales or {}, quantized))
            raise ValueError(
                f"QATCallback: the checkpoint to resume from was trained with {len(different)} other linear layers, such as "
                f"{different[0]}: expected {expected}, got {found}; call quantize_linears as it was called, or unquantize_linears"
            )
        for name, layer in handle.patched.items():
            for which in SHIFTS:
                shift = kept.get(which, {}).get(name)  # checkpoints of earlier versions have no Q shifts
                setattr(layer, which, None if shift is None else torch.tensor(shift))
        for name, linear in quantized.items():
            linear.weight_scale, linear.input_scale = scales[name]

    def _calibrate(self, handle: PatchHandle) -> None:
        trainer, parameters = self.trainer, inspect.signature(type(handle.models[0]).forward).parameters
        names = (parameters.keys() | {*_PACKING}) - {"labels"}
        # Packed samples need use_cache=False. It changes nothing else.
        options = {"use_cache": False} if "use_cache" in parameters else {}
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            loader = trainer.get_train_dataloader()
            batches = []
            for batch in itertools.islice(loader, self.calibration_batches):
                if not isinstance(batch, Mapping) or "input_ids" not in batch:
                    raise ValueError(
                        f"QATCallback: calibration_batches: expected batches with input_ids, got {type(batch).__name__} from the "
                        f"{type(trainer).__name__}; call qat_patch.calibrate(model, batches) before the training, and leave it 0"
                    )
                batches.append({name: x for name, x in batch.items() if name in names} | options)
            if callable(end := getattr(loader, "end", None)):
                end()  # Accelerate treats it as the active loader until it is read to its end
            linears = get_linear_handle(trainer.model)
            if linears is not None and linears.config.rounds_inputs:
                was_training = trainer.model_wrapped.training
                trainer.model_wrapped.eval()
                with torch.no_grad(), handle.disabled(), linears.calibration():
                    for batch in batches:
                        trainer.model_wrapped(**batch)
                trainer.model_wrapped.train(was_training)
            if handle.config.spec.rules.options:
                calibrate(trainer.model_wrapped, batches, exclude=self.calibration_exclude)


def _beginning(key: str, *prefixes: str) -> str | None:
    return next((prefix for prefix in prefixes if key.startswith(f"{prefix}_")), None)


def _scales(linears: LinearHandle) -> dict[str, list[float | None]]:
    """The global scales of the weight and of the input of each layer, as plain values."""
    try:
        return {name: [scale.weight, scale.input] for name, scale in linears.scales.items()}
    except ValueError as error:
        raise ValueError(f"QATCallback: {error}; or set calibration_batches") from None


def _in_force(handle: PatchHandle) -> tuple[AttentionMetadata, Shifts]:
    found = attention_in_force(handle.models[0])
    assert found is not None  # the handle says so
    return found


@contextlib.contextmanager
def _nobody_listening(trainer: Trainer) -> Iterator[list[dict[str, Any]]]:
    """Inside, the trainer logs to a separate list, and to no callback."""
    handler, state = trainer.callback_handler, trainer.state
    callbacks, log_history = handler.callbacks, state.log_history
    handler.callbacks, state.log_history = [], []
    try:
        yield state.log_history
    finally:
        handler.callbacks, state.log_history = callbacks, log_history


@contextlib.contextmanager
def _without_autocast(trainer: Trainer) -> Iterator[torch.nn.Module]:
    """Inside, the trainer's model computes in its own dtype, so that an export's reference can be computed again."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    wrapped = {name: x for name, x in vars(model).items() if name in ("forward", "_original_forward")}
    try:
        yield trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    finally:
        vars(model).update(wrapped)
