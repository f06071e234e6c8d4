"""The plan, shown before step 0, and the summary, shown at the end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from slimpajama_hf import devices, screen
from slimpajama_hf import precision as precisions
from slimpajama_hf.errors import UserError
from slimpajama_hf.model import memory
from slimpajama_hf.model.presets import checkpoint_bytes, vocabulary
from slimpajama_hf.record import checkpoints, evaluations, noise, teaching
from slimpajama_hf.record.columns import LAST_STEPS, mean_of_last, read_columns
from slimpajama_hf.session import range_test_result
from slimpajama_hf.training import range_test, schedule

if TYPE_CHECKING:
    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


_MODEL_ALONE = "the model alone (--save_only_model): this run cannot go on from its checkpoints"
_SHARDED = "of one model, one in each process (FSDP): no samples, passports and prompts, which one alone cannot compute"


def show(
    settings: Settings, trainer: SlimPajamaTrainer, precision: str, tokenizer_name: str, folder: RunFolder
) -> None:
    """Show the plan: corpus, tokenizer, model, memory, precision, steps, and where things go."""
    training, data = settings.training, settings.data
    corpus = trainer.stream.corpus
    model = trainer.accelerator.unwrap_model(trainer.model)
    why = trainer.why_autograd()
    need = _needs(settings, trainer, precision)
    tokenizer: Any = trainer.processing_class
    tokens, rows_of_model = vocabulary(tokenizer), model.config.vocab_size
    start = trainer.stream.start
    where = f", from {start.shard} row {start.row}" if start.shard is not None else ""
    modes = {
        "truncate": f"the first {data.max_seq_length} tokens of each document",
        "window": f"consecutive windows of {data.max_seq_length} tokens",
        "pack": f"documents joined by EOS, blocks of {data.max_seq_length} tokens",
    }
    rows = {
        "corpus": f"{corpus.name} ({corpus.mirror}){where}",
        **({"files": corpus.files_in_words()} if corpus.files_in_words() else {}),
        **({"held out": _held_out(corpus, trainer)} if corpus.held_out_fraction else {}),
        "sample": modes[data.sample_mode],
        "tokenizer": f"{tokenizer_name}, {tokens:,} tokens",
        "model": f"{settings.model.model}, {need.parameters / 1e6:.1f}M parameters"
        + (f", its vocabulary padded to {rows_of_model:,}" if rows_of_model != tokens else ""),
        "device": f"{trainer.args.device}, {precision}{_emulated(precision, trainer.args.device)}, about "
        f"{screen.format_bytes(need.total_bytes)} of memory" + _copied(settings, model, trainer),
        "steps": f"{training.max_steps:,}, {_documents(trainer)}; learning rate {_rate(settings)}{_matrices(trainer)}",
        **({"shards": _SHARDED} if devices.is_sharded() else {}),
        "backward": f"autograd's ({why})" if why else "written out for GPT-2" + _summed(settings, training.world_size),
        **({"saves": _MODEL_ALONE} if training.save_only_model else {}),
        "folder": str(folder.path),
        "look at": _what_to_look_at(settings, folder),
    }
    for name, value in rows.items():
        screen.say(f"{name:>10}  {value}")
    if settings.stranger is not None:
        # Whoever goes on with the run sees what is taken from its folder.
        left = [name for name in settings.stranger.left if name not in settings.typed and name != "output_dir"]
        screen.say(f"{'begun':>10}  elsewhere, or before runs were marked; taken: {', '.join(settings.stranger.taken)}")
        if left:
            screen.say(f"{'not taken':>10}  {', '.join(left)}; type those that you want")
    if (slow := _long_warm_up(settings)) is not None:
        screen.say(f"{'warning':>10}  {slow}")
    warning = memory.warning(model, trainer.args.device, need, settings, memory.processes_here())
    if warning is not None:
        screen.say(f"{'warning':>10}  {warning}")


def _held_out(corpus: Corpus, trainer: SlimPajamaTrainer) -> str:
    """The part of the corpus that is not trained on, and how many of its documents are scored."""
    scored = len(cast("list[Any]", trainer.eval_dataset or []))
    return f"about {corpus.held_out_fraction:.2%} of the documents, by a hash of their text: never trained on" + (
        f"; the first {scored:,} of them are scored" if scored else ""
    )


def _copied(settings: Settings, model: Any, trainer: SlimPajamaTrainer) -> str:
    """Memory that a checkpoint takes while it is written beside training."""
    if trainer.args.save_strategy == "no" or trainer.args.save_only_model or devices.is_sharded():
        return ""
    copies = checkpoint_bytes(model, settings.model.average_weights > 0, trainer.rules)
    return f", and {screen.format_bytes(copies)} of the machine's while a checkpoint is written"


def _summed(settings: Settings, processes: int) -> str:
    """The dtype in which the gradients of several processes are summed."""
    return f", gradients summed over the processes in {settings.model.reduce_dtype}" if processes > 1 else ""


def _needs(settings: Settings, trainer: SlimPajamaTrainer, precision: str) -> memory.Needs:
    """Memory that each process of this run needs."""
    args, sharded = trainer.args, devices.is_sharded()
    written_out = trainer.why_autograd() is None
    return memory.needs(
        trainer.accelerator.unwrap_model(trainer.model),
        settings.data.max_seq_length,
        precision,
        settings.model.average_weights > 0 and not sharded,
        trainer.rules,
        written_out=written_out,
        measures_noise=written_out and args.max_steps >= noise.STEPS_BETWEEN,
        device=args.device.type,
        processes=args.world_size,
        sharded=sharded,
    )


def _rate(settings: Settings) -> str:
    """The learning-rate schedule in words."""
    training = settings.training
    if settings.run.lr_find:
        return (
            f"rises from {range_test.LOWEST:g} to {range_test.HIGHEST:g}, the same number of steps in every decade "
            "(--learning_rate and --warmup_steps do not count)"
        )
    return f"{training.learning_rate:g} after {training.get_warmup_steps(training.max_steps):,} steps of warm-up"


def _what_to_look_at(settings: Settings, folder: RunFolder) -> str:
    """Which files to look at, and when."""
    if settings.run.lr_find:
        return f"{folder.path / range_test_result.CHART}, at the end; no samples, checkpoints and held-out scores"
    if not settings.run.viz_interval:
        return f"nothing (--viz_interval 0); to draw what the ledger has: python -m slimpajama_hf views {folder.path}"
    return f"{folder.report} and {folder.latest_chart}{_when_drawn(settings)}"


def _when_drawn(settings: Settings) -> str:
    interval = settings.run.viz_interval
    if "viz_interval" not in settings.typed:
        return ", from the first step on"
    return f", every {interval:,} steps" if interval <= settings.training.max_steps else ", at the end"


def _long_warm_up(settings: Settings) -> str | None:
    """A warning if the rate rises for more than half of the run, else None."""
    training = settings.training
    steps, warmup = training.max_steps, training.get_warmup_steps(training.max_steps)
    if settings.run.lr_find or warmup <= steps / 2:
        return None
    highest = schedule.get_learning_rate(steps - 1, training.learning_rate, warmup)
    return (
        f"the warm-up of {warmup:,} steps is longer than half of the run ({steps:,} steps), which ends at a rate "
        f"of {highest:.2g}; it learns more with --warmup_steps {max(steps // 5, 1)}"
    )


def _emulated(name: str, device: Any) -> str:
    """A warning if the device emulates this precision."""
    return " (which it computes by way of float32: slow)" if precisions.emulated(name, device) else ""


def _matrices(trainer: SlimPajamaTrainer) -> str:
    """How the matrices in the blocks learn, if they learn differently from the rest."""
    rules = trainer.rules
    if rules.by_muon:
        by_row = ", embeddings with one second moment a token" if rules.by_row else ""
        return f", matrices by Muon at {rules.hidden_rate:g} of it{by_row}"
    return f", matrices at {rules.hidden_rate:g} of it" if rules.hidden_rate != 1.0 else ""


def _documents(trainer: SlimPajamaTrainer) -> str:
    """The documents of a step, in words."""
    processes, accumulated = trainer.args.world_size, trainer.args.gradient_accumulation_steps
    words = "one document each" if processes == 1 else f"{processes} documents each, one of every process"
    if accumulated > 1:
        words = (
            f"{processes * accumulated} documents each, {accumulated} of every process accumulated "
            "(small batches learn as much and need no accumulation: arXiv 2507.07101)"
        )
    return words


def _held_out_scores(folder: RunFolder, steps: int) -> list[str]:
    """Lines with the last held-out scores of a run, for its weights and for their average; none if there are none."""
    entries = evaluations.read(folder.evaluations, steps)
    if not entries:
        return []
    entry = entries[-1]
    when = "" if entry["step"] == steps else f" at step {entry['step']:,}"
    documents = f"{entry['scores']['all']['samples']:,} documents{when}"
    lines = [f"       held out  {_in_words(entry['scores']['all'])} ({documents})"]
    if entry.get("averaged"):
        lines.append(f"       averaged  {_in_words(entry['averaged']['all'])} (the average of the weights)")
    return lines


def _in_words(scores: dict[str, Any]) -> str:
    if None in (scores["bits_per_byte"], scores["loss"], scores["accuracy"]):
        return "a loss that is not finite"
    return (
        f"{scores['bits_per_byte']:.4f} bits per byte, {scores['loss']:.4f} nats per token, "
        f"{scores['accuracy']:.1%} right"
    )


def _last_steps(values: Any) -> str:
    """Say over how many steps `mean_of_last` is taken."""
    count = min(int(np.isfinite(values).sum()), LAST_STEPS)
    return f"mean of the last {count} steps" if count != 1 else "of a single step"


def summary(
    folder: RunFolder, trainer: SlimPajamaTrainer, outcome: str, seeing_seconds: float, is_range_test: bool = False
) -> list[str]:
    """The lines at the end of a run: steps, time, throughput, held-out scores, loss, accuracy, where everything is."""
    columns = read_columns(folder.ledger)
    counted = None
    # Numbers are shown even if somebody has removed run.json meanwhile.
    with contextlib.suppress(UserError):
        counted = folder.read_record().get("initial_embeddings")
    clock = trainer.clock
    tokens = int(columns.tokens[-trainer.steps_of_session :].sum()) if trainer.steps_of_session else 0
    rate = tokens / clock.training_seconds if clock.training_seconds else 0.0
    seeing = seeing_seconds / max(clock.training_seconds + seeing_seconds, 1e-9)
    beside = "".join(f", {screen.format_time(seconds)} of {what}" for what, seconds in sorted(clock.seconds_of.items()))
    saved = [checkpoints.path_of(folder.path, step) for step in checkpoints.steps(folder.path)]
    lines = [
        f"{outcome}: {len(columns):,} steps, {trainer.steps_of_session:,} of them now, in "
        f"{screen.format_time(clock.training_seconds)} of training ({rate:,.1f} tokens/s)"
        f" and {screen.format_time(seeing_seconds)} of seeing ({seeing:.1%} of the run){beside}",
    ]
    if is_range_test:
        # At rates that are far too high, losses and scores say nothing.
        return [*lines, f"{'ledger':>15}  {folder.ledger}"]
    lines += [
        *_held_out_scores(folder, len(columns)),
        f"     final loss  {mean_of_last(columns.loss):.4f} nats per token ({_last_steps(columns.loss)})",
        f" final accuracy  {mean_of_last(columns.accuracy):.1%} of next tokens",
        f"    prequential  {columns.prequential_bits_per_byte():.4f} bits per byte (documents scored before learned"
        + (f"; neighbours in the first {counted['documents']:,} were counted before)" if counted else ")"),
    ]
    found = noise.estimate(columns.grad_square, columns.grad_agreement)
    if found is not None:
        lines.append(f"    noise scale  {noise.in_words(found)}")
    taught = teaching.in_words(*teaching.of_columns(columns))
    if taught is not None:
        lines.append(f"       teaching  {taught}")
    if trainer.measuring.left_out:
        times = ", ".join(
            f"{kind} {count:,} time{'s' * (count > 1)}" for kind, count in trainer.measuring.left_out.most_common()
        )
        lines.append(f"   not measured  {times}, for lack of memory")
    skipped = trainer.skipped_records
    if skipped:
        lines.append(
            f"        skipped  {sum(skipped.values()):,} records: {trainer.stream.in_words(skipped, len(columns))}"
        )
    left = {
        "chart": folder.latest_chart,
        "report": folder.report,
        "metrics": folder.viz / "metrics_history.json",
        "samples": folder.viz / "text_samples.json",
        "ledger": folder.ledger,
    }
    # If a file could not be written, that was said already. Only files that exist are listed.
    lines += [f"{name:>15}  {path}" for name, path in left.items() if path.is_file()]
    return [*lines, f"     checkpoint  {saved[-1] if saved else 'none'}"]
