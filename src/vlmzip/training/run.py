"""A training run, from its configuration to the saved model."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler, set_seed
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from vlmzip import spec
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError, how_to_install
from vlmzip.files import is_folder
from vlmzip.models import family_of
from vlmzip.models.family import Family
from vlmzip.processes import Processes
from vlmzip.processor import Processor
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.fingerprint import of_code, of_files, of_json, of_method_code, of_model
from vlmzip.runtime.fitting import fitted
from vlmzip.runtime.prompt import pad_id
from vlmzip.training.batches import BAD, Collator, Examples, Preprocessor, count_bad
from vlmzip.training.config import Config, Lora
from vlmzip.training.folder import RunFolder, fill_whole, how_to_resume, refused_by_disk, take_name
from vlmzip.training.records import Records
from vlmzip.training.schedule import Schedule, read_compressor
from vlmzip.training.sharding import moves_together
from vlmzip.training.trainer import LOG, JsonLog, Score, Sharded, StagedTrainer, step_of
from vlmzip.visual_tokens import Site

log = logging.getLogger(__name__)
NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}
#: transformers 5.23 renames this setting and warns about the old name.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
#: Number of records to read before the first step, to estimate how many can be used.
SAMPLE = 64
#: Number of evenly spaced steps at which to try a learning-rate schedule; shorter runs try every step.
TRIED = 1000
#: Number of steps to try a run with if only its epochs are known.
MANY_STEPS = 10**6


def train(
    config: Config,
    model: nn.Module,
    processor: Processor,
    family: Family,
    score: Score | None = None,
) -> Path:
    """Train `model` as configured, save it with the schedule's compressor for afterwards, and return its folder.

    `score` evaluates the model during the run if the configuration has an evaluation.

    A stopped run continues from its last complete checkpoint. A finished run is left as it is. Raise `UserError` for a
    model or setting that cannot be trained, for a folder that another run or another program has written to, and if
    writing to the disk fails. Earlier checkpoints stay.
    """
    if config.evaluation is not None and score is None:
        raise UserError("evaluation: train needs a score, such as vlmzip.lab.score.TaskScore")
    set_seed(config.seed)
    processes, out = Processes(), Path(config.out)
    schedule = config.schedule_for(family.profile().layers)
    records = Records(Path(config.records))
    steps = config.steps_for(len(records))
    examples = _examples(config, records, processor, family, schedule)
    sources = _sources(records, model, processor, schedule) if processes.first else {}
    compressed = attach(_with_lora(model, config.lora), schedule.stages[0].compressor)
    _choose_what_learns(compressed, family, config.learn, config.lora)
    trainer = make_trainer(config, compressed, schedule, examples, family, steps, score)
    _check_stages(compressed, schedule, trainer.evaluated_with)
    if config.lora is not None and not trainer.sharded and moves_together(compressed):
        raise UserError(
            "lora: adapters cannot be merged into the split weights of ZeRO-3; use ZeRO-2 or sharding: fsdp"
        )
    folder = processes.from_first(lambda: RunFolder.begin(out, config, len(records), steps, records.bad, sources))
    if folder.finished:
        log.info(f"this run is finished; to start a new one, give a different out than {config.out!r}")
        return folder.model
    log.info(_about(compressed, config, steps, len(examples), trainer.args.device))
    if records.bad:
        log.warning(
            f"{len(records.bad):,} of {len(records) + len(records.bad):,} records cannot be used; see {out / BAD}"
        )
    if left_out := processes.from_first(lambda: _look_at(examples, config)):
        log.warning(left_out)
    if folder.checkpoint is not None:
        log.info(f"resuming from {folder.checkpoint}")
        for note in folder.notes:
            log.warning(note)
    try:
        _run(trainer, folder.checkpoint, steps)
        state = trainer.gather()
        if trainer.args.should_save:
            _save(compressed, schedule.afterwards, processor, folder.model, state)
    except KeyboardInterrupt:
        if processes.first:
            log.info(f"stopped; {how_to_resume(out)}")
        raise
    except Exception as error:
        if (reason := refused_by_disk(error)) is None:
            raise
        raise UserError(f"cannot write into {str(out)!r}: {reason}; {how_to_resume(out)}") from None
    if trainer.args.should_save:
        for reason, count in count_bad(out / BAD).most_common():
            log.warning(f"{count:,} of {len(records) + len(records.bad):,} records left out: {reason}")
        log.info(f"the trained model uses {spec.write(schedule.afterwards)}")
    return folder.model


def _about(compressed: CompressedModel, config: Config, steps: int, records: int, device: torch.device) -> str:
    """Return a line that describes the run: weights, steps, records, precision and device."""
    sizes = [(weights.numel(), weights.requires_grad) for weights in compressed.parameters()]
    learn, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    return (
        f"{learn / 1e6:,.1f} of {total / 1e6:,.1f} million weights learn, in {steps:,} steps of {config.batch:,} from"
        f" {records:,} records; {config.precision} on {device}"
    )


def _look_at(examples: Examples, config: Config) -> str:
    """Return a line about records that are left out, or "". Raise `UserError` if too many are left out.

    Invalid records, which are known from reading the file, count as left out.
    """
    looked, reasons, first = examples.look_at(SAMPLE)
    for _, reason in examples.records.bad:
        reasons.setdefault(reason, 0)
    records, known = len(examples.records), len(examples.records.bad)
    bad = sum(reasons.values())
    share = (known + records * bad / looked) / (records + known)
    if not share:
        return ""
    problems = ", ".join(f"{count} {reason}" if count else reason for reason, count in reasons.most_common(4))
    if share <= config.most_left_out:
        return f"{bad} of {looked} records looked at are left out: {problems}" if bad else ""
    raise UserError(
        f"records: about {share:.0%} of them are left out, more than max_left_out, {config.max_left_out}; of {looked}"
        f" looked at: {problems}{f' ({first})' if first and first not in reasons else ''}; correct the records"
        + ("" if share == 1 else ", or set max_left_out: 100% to train on the rest")
    )


def _check_stages(compressed: CompressedModel, schedule: Schedule, evaluated_with: Compressor) -> None:
    """Raise `UserError` before the run starts if the model cannot switch to one of its compressors."""
    first = compressed.compressor
    for compressor in (*(stage.compressor for stage in schedule.stages), schedule.afterwards, evaluated_with):
        compressed.switch(compressor)
    compressed.switch(first)


def _run(trainer: StagedTrainer, checkpoint: Path | None, steps: int) -> None:
    if checkpoint is not None and step_of(checkpoint) >= steps and not trainer.is_deepspeed_enabled:
        trainer._load_from_checkpoint(str(checkpoint))  # Trainer would take one more step
        return
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except UserError as error:  # an error from a worker process contains its traceback in the message
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None


def make_trainer(
    config: Config,
    compressed: CompressedModel,
    schedule: Schedule,
    examples: Examples,
    family: Family,
    steps: int,
    score: Score | None = None,
) -> StagedTrainer:
    """Make the trainer for a façade. It evaluates with the compressor for afterwards, or the evaluation's own one."""
    evaluation = config.evaluation
    evaluated_with = (
        read_compressor(evaluation.compressor) if evaluation and evaluation.compressor else schedule.afterwards
    )
    sharded = config.sharding != "none" and Processes().count > 1
    settings: dict[str, Any] = {
        "score": score if evaluation else None,
        "lengths": examples.lengths(_visual_tokens(schedule, family.profile())) if config.group_by_length else None,
        "args": arguments(config, steps),
        "train_dataset": examples,
        "eval_dataset": examples if evaluation else None,  # makes Trainer evaluate; `score` asks other questions
        "data_collator": Collator(pad_id(family), *_blanks(examples)),
        "callbacks": [JsonLog(Path(config.out) / LOG, schedule), *([Sharded()] if sharded else [])],
    }
    try:
        _try_optimiser(settings["args"], compressed, steps)
        return StagedTrainer(
            compressed, schedule, evaluated_with=evaluated_with, batch=config.batch, checkpoints=config.checkpoints,
            longest=examples.conversations.longest, sharded=sharded, **settings,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"out: cannot write into {config.out!r}: {error.strerror or error}") from None
    except (RuntimeError, ImportError, TypeError, ValueError) as error:
        # A setting under `trainer` needs something that is not installed, or has an invalid value.
        raise UserError(f"trainer: {' '.join(str(error).split())[:200]}") from None


def _visual_tokens(schedule: Schedule, profile: Profile) -> int:
    """Estimate the visual tokens of an image before the LLM, as a mean over the stages."""
    counts = []
    for compressor in (stage.compressor for stage in schedule.stages):
        least, most = compressor.least_count(profile.grids), compressor.image_count(profile.grids)
        inside = compressor.stages()[0].site is Site.IN_LLM
        counts.append(profile.size if inside else (least + (profile.size if most is None else most)) / 2)
    return round(sum(counts) / len(counts))


def _blanks(examples: Examples) -> list[dict[str, Tensor]]:
    """Return a row with a blank image and, if some records have videos, one with a blank video."""
    rows = examples.conversations
    has_videos = examples.records.have_videos and rows.takes_videos
    return [rows.blank(), *([rows.blank_video()] if has_videos else [])]


def _try_optimiser(args: TrainingArguments, model: nn.Module, steps: int) -> None:
    """Raise now what Trainer would raise during the run for a bad optimiser or learning-rate schedule."""
    try:
        _try_optimiser_step(args, model)
    except (ArithmeticError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        if not args.optim_args:
            raise
        optim = OptimizerNames(args.optim).value
        raise ValueError(f"optim {optim} with optim_args {args.optim_args!r}: {error}") from error
    _try_schedule(args, steps)


def _try_optimiser_step(args: TrainingArguments, model: Any) -> None:
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    needs_model = settings.keys() & {"params", "model", "optimizer_dict"}
    if isinstance(optimizer, type) and not needs_model:
        weights = torch.zeros(64, 64, device=args.device, requires_grad=True)
        weights.grad = torch.zeros_like(weights)
        optimizer([weights], **settings).step()


def _try_schedule(args: TrainingArguments, steps: int) -> None:
    """Raise `ValueError` for an invalid learning-rate schedule, or one without a valid rate at some step."""
    name, kwargs = SchedulerType(args.lr_scheduler_type).value, args.lr_scheduler_kwargs
    warmup = args.get_warmup_steps(steps)
    assert not isinstance(kwargs, str)  # TrainingArguments has read it
    label = f"lr_scheduler_type {name} with lr_scheduler_kwargs {kwargs or {}}"
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        schedule = get_scheduler(name, stand_in, warmup, steps, kwargs)
        assert isinstance(schedule, LambdaLR)  # true for all schedules that a run can have
        (factor_at,) = schedule.lr_lambdas
        marks = {warmup - 1, warmup, warmup + 1, steps - 1, steps, *range(0, steps, steps // TRIED or 1)}
        factors = {step: factor_at(step) for step in sorted(marks) if 0 <= step <= steps}
    except Exception as error:  # schedules raise errors of any type
        raise ValueError(f"{label}: {error}") from error
    for step, factor in factors.items():
        if not (isinstance(factor, int | float) and 0 <= factor < math.inf):
            raise ValueError(f"{label}: step {step:,} would have {factor!r} times the learning rate")


def try_out(config: Config) -> None:
    """Raise `UserError` for settings under `trainer` that cannot work on this machine, such as a missing package.

    This check needs no model, so it runs before a large model is loaded.
    """
    settings = dict(config.trainer)
    if not settings:
        return
    if settings.pop("deepspeed", None) and find_spec("deepspeed") is None:
        raise UserError("trainer: deepspeed is not installed: pip install deepspeed")
    args = arguments(dataclasses.replace(config, trainer=settings), steps := config.steps or MANY_STEPS)
    try:
        if "optim_target_modules" not in settings:  # an optimiser that names parts of the model is tried with the model
            _try_optimiser(args, nn.Linear(2, 2), steps)
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
        if args.torch_compile:
            _try_compiling(args)
    except Exception as error:  # packages raise errors of any type
        raise UserError(f"trainer: {' '.join(str(error).split())[:300] or type(error).__name__}") from None


def _try_compiling(args: TrainingArguments) -> None:
    options: Any = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    TorchDynamoPlugin(**options)  # checks the backend's name as accelerate will
    module = nn.Linear(2, 2).to(args.device)
    torch.compile(module, **options)(torch.zeros(1, 2, device=args.device)).sum().backward()


def arguments(config: Config, steps: int) -> TrainingArguments:
    """Return the configuration as TrainingArguments for a run of `steps` optimiser steps.

    Raise `UserError` if the processes cannot share the batch evenly, or if transformers refuses a setting.
    """
    processes = Processes().count
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("accelerate's FSDP is not supported; write sharding: fsdp into the configuration instead")
    if config.batch % processes:
        raise UserError(f"batch must be a multiple of the {processes} processes, got {config.batch}")
    share = config.batch // processes
    at_once = config.batch_per_process or share
    if share % at_once:
        raise UserError(f"batch_per_process must divide the {share} records per process and step, got {at_once}")
    settings: dict[str, Any] = {
        "output_dir": config.out,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": share // at_once,
        "max_steps": steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "bf16": config.precision == "bf16",
        CHECKPOINTING: config.gradient_checkpointing,
        "logging_steps": config.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # the filter would log a NaN loss as 0
        "save_steps": config.save_every,
        "save_total_limit": None,  # our trainer removes an old checkpoint only when the new one is complete
        "eval_strategy": "steps" if config.evaluation else "no",
        "eval_steps": config.evaluation.every if config.evaluation else None,
        "dataloader_num_workers": config.workers,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "seed": config.seed,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": ["tensorboard"] if _has_tensorboard() else [],
    }
    try:
        return TrainingArguments(**{**settings, **config.for_trainer()})
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if "ddp_backend" in config.trainer and "process group has not been initialized" in reason:
            backend = config.trainer["ddp_backend"]
            reason = f"ddp_backend: {backend} needs several processes; start the run with torchrun, or leave it out"
        raise UserError(f"trainer: {reason}") from error


def _sources(records: Records, model: nn.Module, processor: Processor, schedule: Schedule) -> dict[str, str]:
    """Return digests of the records file, the base model and the code. Images are not hashed: there are too many."""
    digests = of_model(model, processor)
    weights = digests.pop("weights")
    for name in ("attention", "dtype", "device"):  # two are settings; a run may continue on another device
        del digests[name]
    compressors = (*(stage.compressor for stage in schedule.stages), schedule.afterwards)
    methods = [of_method_code(compressor) for compressor in compressors]
    return {
        "records file": of_files([records.path]),
        "base model": weights,
        **digests,
        "code of vlmzip": of_code("training"),
        "method code": of_json(methods) if any(methods) else "",
    }


def _examples(config: Config, records: Records, processor: Processor, family: Family, schedule: Schedule) -> Examples:
    folder = Path(config.images) if config.images is not None else records.path.parent
    if not is_folder(folder):
        raise UserError(f"images: there is no folder {str(folder)!r}")
    if records.have_video_files and find_spec("av") is None:
        raise UserError(f"records: reading video files needs PyAV: {how_to_install('video')}")
    compressors = [fitted(stage.compressor, family) for stage in schedule.stages]
    conversations = Preprocessor(processor, family, config.max_length, config.frames, compressors)
    return Examples(records, folder, conversations, Path(config.out) / BAD, _subset(len(records), config))


def _subset(count: int, config: Config) -> Sequence[int]:
    """Return the indices of the records to use, in the order of the file."""
    if config.share == 1:
        return range(count)
    return sorted(random.Random(config.seed).sample(range(count), config.chosen(count)))


def _with_lora(model: nn.Module, lora: Lora | None) -> nn.Module:
    if lora is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError(f"lora needs peft: {how_to_install('train')}") from None
    targets = family_of(model).lora_targets
    lora_config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    return get_peft_model(model, lora_config)


def _choose_what_learns(compressed: CompressedModel, family: Family, learn: Sequence[str], lora: Lora | None) -> None:
    """Freeze the model except for the parts that learn. A compressor's own weights always learn."""
    for name, parameter in compressed.inner.named_parameters():
        parameter.requires_grad_(lora is not None and "lora_" in name)
    if lora is None:
        for module in (family.llm, family.model.get_output_embeddings()):
            module.requires_grad_("llm" in learn)
    for each in family.modalities:  # some models have an encoder of their own for videos
        each.vision_encoder.requires_grad_("vision" in learn)
    family.projector.requires_grad_("projector" in learn)  # last: in some families the encoder holds it


def _save(
    compressed: CompressedModel,
    compressor: Compressor,
    processor: Processor,
    folder: Path,
    state: dict[str, object] | None = None,
) -> None:
    """Save the model, the compressor and the processor. LoRA adapters are merged, so transformers can load the model.

    `state` is the façade's state dict if its parameters are sharded.
    """
    compressed.switch(compressor)
    if hasattr(compressed.inner, "merge_and_unload"):
        compressed.detach()
        compressed = attach(compressed.inner.merge_and_unload(), compressor)
    unfinished = fill_whole(folder)
    compressed.save_pretrained(unfinished, **({} if state is None else {"state_dict": state}))
    processor.save_pretrained(unfinished)
    take_name(unfinished, folder)


def _has_tensorboard() -> bool:
    return find_spec("tensorboard") is not None
