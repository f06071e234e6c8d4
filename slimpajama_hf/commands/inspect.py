"""`inspect RUN --step N` or `--find TEXT`: show a step, or where a text was read (`lookback/inspection.py`,
`lookback/search_finding.py`)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimpajama_hf import palette, terminal
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.record import ledger
from slimpajama_hf.screen import Waiting
from slimpajama_hf.settings.arguments import positive

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from slimpajama_hf.lookback.inspection import Inspection
    from slimpajama_hf.lookback.search_finding import Match
    from slimpajama_hf.lookback.search_growing import Extent
    from slimpajama_hf.lookback.search_losses import Losses


HELP = "the passport, the text and the tokens of a step; was this ever read?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `inspect`."""
    parser.add_argument("run", help="a run folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="N", help="passport, text and tokens of this step")
    what.add_argument("--find", metavar="TEXT", help="whether this was read, when, and with what loss")
    parser.add_argument("--checkpoint", type=int, metavar="M", help="with --step: how checkpoint-M sees the document")
    parser.add_argument("--sample", type=int, metavar="K", help="with --step: which of its samples, from 0 [0]")
    parser.add_argument("--tokens", type=positive, metavar="K", help="with --step: tokens in the table [12]")
    parser.add_argument("--json", action="store_true", help="print JSON")


#: Rows of the table of tokens when the text is coloured too.
TOKENS_SHOWN = 12


#: Characters shown of a token in the table.
TOKEN_SHOWN = 18


#: Characters shown before and after the trained part of a text.
CUT_SHOWN = 300


# ---- showing ----


def _passport_lines(found: Inspection) -> list[tuple[str, str]]:
    row, record = found.row, found.record
    mode = record["model"]["sample_mode"]
    about = "" if row["tokens_cut_exact"] else "about "
    tokens = f"{row['tokens']:,} trained, {row['text_bytes']:,} bytes"
    if mode == "truncate":
        tokens += f"; {about}{row['tokens_cut']:,} cut"
    elif mode == "window":
        tokens += f"; window {row['part']} of its document, counted from 0"
    bits = row["code_bits"]
    per_byte = bits / row["text_bytes"] if bits is not None and row["text_bytes"] else None
    name = record["corpus"]["name"]
    lines = [
        ("corpus", name if name == row["mirror"] else f"{name} ({row['mirror']})"),
        ("document", f"{row['shard']} row {row['row']:,}"),
        ("SHA-1", row["text_sha1"]),
        ("domain", palette.domain_name(row["domain"])),
        ("tokens", tokens),
        ("loss", f"{terminal.number(row['loss'])} nats per token, {terminal.number(per_byte, '.3f')} bits per byte"),
        ("accuracy", f"{terminal.number(row['accuracy'], '.1%')} of next tokens right"),
        ("gradient", f"{terminal.number(row['grad_norm'])} (L2 norm before clipping)"),
        ("learning rate", f"{row['learning_rate']:.3e}"),
        ("time", f"{1000 * row['step_seconds']:,.1f} ms, {row['throughput']:,.0f} tokens/s"),
    ]
    lines += [(name.replace("_", " "), terminal.number(value)) for name, value in ledger.added(row).items()]
    if found.places[1:]:
        joined = ", ".join(f"{place.name} ({place.tokens})" for place in found.places)
        lines[1] = ("documents", f"{len(found.places)} joined by EOS (tokens): {joined}")
    if row.get("spike") is not None:
        lines.append(("spike", f"{row['spike']:g} robust standard deviations above the 200 steps before it"))
    if row.get("loss_after") is not None:
        # The ledger's next row has the loss of the next document after this update.
        following = f"; that of the next document was {row['next_loss']:.4f} before it" if row.get("next_loss") else ""
        lines.append(("taught", f"loss {row['loss_after']:.4f} after its own update{following}"))
    if row.get("update_skipped"):
        lines.append(("not learned", f"the update was skipped: {row['update_skipped']}"))
    if row.get("skipped"):
        passed = ", ".join(f"{count:,} {reason}" for reason, count in row["skipped"].items())
        lines.append(("passed over", f"{passed} (records before this one)"))
    for gap in row.get("gaps") or []:
        lines.append(("gap", f"{gap['shard']} set aside from row {gap['row']:,} on: {gap['reason']}"))
    return lines


def show_passport(drawn: Console, found: Inspection) -> None:
    """Print the passport of a step."""
    from rich.text import Text

    drawn.print(Text(f"step {found.row['step']:,} of {found.run}", "bold"))
    table = terminal.grid({}, {"overflow": "fold"})
    for name, value in _passport_lines(found):
        shown = Text(terminal.visible(value, line_ends=False))
        if name == "domain":
            # Only the mark has the domain's colour, which may be as dark as the terminal's background.
            shown = Text.assemble(("■ ", palette.domain_colour(found.row["domain"])), shown)
        table.add_row(Text(name, "dim"), shown)
    drawn.print(table)


def show_text(drawn: Console, found: Inspection, tokens_shown: int | None) -> None:
    """Print the text of a step, its tokens coloured by their surprisal, and the table of the most telling tokens.

    `tokens_shown`: rows of the table; None: a few if there are colours, else all.
    """
    from rich.text import Text

    from slimpajama_hf.lookback.inspection import mean_of

    colours = terminal.has_colours(drawn)
    views: list[tuple[str, np.ndarray | None]] = [("", None)]
    if colours and found.then is not None:
        views = [(f"as it was learned ({found.then_source}), loss {terminal.number(mean_of(found.then))}", found.then)]
    if colours and found.now is not None:
        views = [view for view in views if view[1] is not None]
        views.append(
            (f"under checkpoint-{found.now.step}, loss {terminal.number(mean_of(found.now.nats))}", found.now.nats)
        )
    for title, nats in views:
        drawn.print()
        heading = Text("text", "bold")
        if title:
            heading.append(f" {title}", "not bold")
        drawn.print(heading)
        if nats is views[0][1] and nats is not None:
            drawn.print(terminal.legend())
        drawn.print(_text(found, nats), overflow="fold", end="")
    if found.then is not None or found.now is not None:
        _show_tokens(drawn, found, tokens_shown if tokens_shown is not None else TOKENS_SHOWN if colours else 10**9)
    for note in found.notes:
        drawn.print(Text(f"note: {note}", "italic"))


def _text(found: Inspection, nats: np.ndarray | None) -> Text:
    """The text of a step. The parts of each document that were not trained on are dim."""
    from rich.text import Text

    from slimpajama_hf.lookback import reread

    shown = Text(end="")
    for number, document in enumerate(found.documents):
        start, end = reread.covered(found.tokens, number)
        if found.documents[1:]:
            shown.append(f"[{found.places[number].name}]\n", "dim")
        if start:
            left_out = f"… {start - CUT_SHOWN:,} characters … " if start > CUT_SHOWN else ""
            shown.append(left_out + terminal.visible(document.text[max(0, start - CUT_SHOWN) : start]), "dim")
            shown.append("▏")
        for index, token in enumerate(found.tokens):
            if token.document == number:
                known = nats is not None and index > 0
                style = terminal.surprisal_style(float(nats[index - 1])) if known else ""  # type: ignore[index]
                shown.append(terminal.visible(found.text_of(token)), style)
        if end < len(document.text):
            rest = len(document.text) - end
            shown.append("▏")
            shown.append(terminal.visible(document.text[end : end + CUT_SHOWN]), "dim")
            if rest > CUT_SHOWN:
                shown.append(f" … {rest - CUT_SHOWN:,} characters more", "dim")
        if not shown.plain.endswith("\n"):
            shown.append("\n")
    return shown


def _show_tokens(drawn: Console, found: Inspection, most: int) -> None:
    """Print tokens with their surprisal then and now: all in order, or the most telling ones."""
    import numpy as np
    from rich.text import Text

    then = found.then
    now = found.now.nats if found.now is not None else None
    both = now - then if now is not None and then is not None else None
    weight = np.abs(both) if both is not None else then if then is not None else now
    assert weight is not None
    chosen: np.ndarray = np.arange(len(weight))
    title = "every token"
    if most < len(weight):
        chosen = np.sort(np.argsort(-np.nan_to_num(weight, nan=-1.0), kind="stable")[:most])
        what = "that changed most" if both is not None else "that surprised most"
        title = f"the {most} tokens {what} (all of them: --tokens {len(weight)})"
    drawn.print()
    drawn.print(Text(f"{title}, nats", "bold"))
    columns: list[dict[str, Any]] = [{"header": "place", "justify": "right", "min_width": 5}, {"header": "token"}]
    columns += [
        {"header": name, "justify": "right", "min_width": len("change")}
        for name, column in (("then", then), ("now", now), ("change", both))
        if column is not None
    ]
    if found.now is not None:
        # Only the last column may be cut.
        columns[1]["min_width"] = max(len(_quoted(found.text_of(found.tokens[index + 1]))) for index in chosen)
        columns.append({"header": f"what checkpoint-{found.now.step} expected", "overflow": "ellipsis"})
    table = terminal.grid(*(column | {"no_wrap": True} for column in columns))
    for index in chosen.tolist():
        token = found.tokens[index + 1]
        cells = [Text(str(index + 1), "dim"), _quoted(found.text_of(token))]
        cells += [
            Text(terminal.number(float(column[index]), ".2f"), terminal.surprisal_style(float(column[index])))
            for column in (then, now)
            if column is not None
        ]
        if both is not None:
            change = float(both[index])
            cells.append(Text(terminal.number(change, "+.2f"), terminal.LESS if change < 0 else terminal.MORE))
        if found.now is not None:
            guesses = Text(overflow="ellipsis", no_wrap=True)
            for guess in found.now.guesses[index]:
                right = guess.id == token.id
                guesses.append_text(_quoted(guess.text, "bold" if right else ""))
                guesses.append(f" {guess.probability:.0%}  ", "dim")
            cells.append(guesses)
        table.add_row(*cells)
    drawn.print(table)


def _quoted(text: str, style: str = "") -> Text:
    """The first characters of a token's text between marks, which make its spaces visible."""
    from rich.text import Text

    shown = terminal.visible(text, line_ends=False)
    return Text(f"‹{shown if len(shown) <= TOKEN_SHOWN else shown[: TOKEN_SHOWN - 1] + '…'}›", style)


# ---- the command ----


def main(options: argparse.Namespace) -> int:
    """Run `inspect RUN --step N` or `--find TEXT`. Returns the exit code."""
    from slimpajama_hf.lookback.inspection import complete, passport

    if options.find is not None:
        if any(each is not None for each in (options.checkpoint, options.tokens, options.sample)):
            raise UsageError("--find: --checkpoint, --tokens and --sample belong to --step; leave them out")
        return find_text(options.run, options.find, options.json)
    found, predicted = passport(options.run, options.step, options.sample)
    if options.json:
        complete(found, predicted, options.checkpoint)
        sys.stdout.write(json.dumps(found.to_dict(), indent=1) + "\n")
        return 0
    drawn = terminal.console()
    try:
        complete(found, predicted, options.checkpoint)
    except UserError:
        # Even if the text cannot be read again, the ledger's numbers are known.
        show_passport(drawn, found)
        raise
    show_passport(drawn, found)
    show_text(drawn, found, options.tokens)
    return 0


#: Matches shown on a terminal. Losses are looked up for as many steps.
MATCHES_SHOWN = 20


#: Characters shown of a match.
_TEXT_SHOWN = 300


# ---- the answer ----


def find_text(run: str, wanted: str, as_json: bool) -> int:
    """Run `inspect RUN --find TEXT`: extend the index and answer. Returns the exit code. Raises UserError if the text
    was not found and some documents cannot be read again."""
    from slimpajama_hf.lookback.search_finding import find, pattern_of
    from slimpajama_hf.lookback.search_growing import extend
    from slimpajama_hf.lookback.search_losses import losses_of
    from slimpajama_hf.record.run_folder import RunFolder

    pattern_of(wanted)
    folder = RunFolder(Path(run).expanduser())
    with Waiting("opening the search index") as waiting:
        extent = extend(folder, waiting=waiting)
        waiting("searching")
        matches = find(folder, wanted)
        waiting("looking up the losses")
        losses = losses_of(folder, matches, MATCHES_SHOWN)
    read = any(match.read for match in matches)
    if extent.missing and not read:
        step, why = extent.missing[0]
        missing = len(extent.missing)
        raise UserError(
            f"not read in {extent.steps - missing:,} steps, but the text of {missing:,} others cannot be had again "
            f"(the first: step {step}, {why}); bring the corpus back to be sure"
        )
    if as_json:
        sys.stdout.write(json.dumps(_to_dict(run, wanted, extent, matches, losses, read), indent=1) + "\n")
    else:
        _show(run, wanted, extent, matches, losses)
    return 0


def _to_dict(
    run: str, wanted: str, extent: Extent, matches: list[Match], losses: dict[int, Losses], read: bool
) -> dict[str, Any]:
    return {
        "run": run,
        "text": wanted,
        "read": read,
        "steps_searched": extent.steps,
        "documents_searched": extent.documents,
        "steps_not_searched": [{"step": step, "reason": why} for step, why in extent.missing],
        "matches": [dataclasses.asdict(match) for match in matches],
        "losses": [
            {"step": each.step, "loss": each.row["loss"], "text_loss": each.own_loss, "text_tokens": each.own_tokens,
             "accuracy": each.row["accuracy"], "domain": each.row["domain"]}
            for each in losses.values()
        ],
    }  # fmt: skip


def _show(run: str, wanted: str, extent: Extent, matches: list[Match], losses: dict[int, Losses]) -> None:
    from rich.text import Text

    drawn = terminal.console()
    steps = sorted({read.step for match in matches if match.read for read in match.reads})
    quoted = f"“{terminal.visible(wanted, line_ends=False)}”"
    where = f"{extent.steps:,} steps of {run}"
    if steps:
        times = f"at step {steps[0]:,}" if len(steps) == 1 else f"at {len(steps):,} steps, first at {steps[0]:,}"
        answer = f"{quoted} was read {times}, of {where}"
    elif matches:
        count = "a document" if len(matches) == 1 else f"{len(matches):,} documents"
        answer = f"{quoted} was not read: it stands in {count} of the {where}, but in what was cut"
    else:
        answer = f"{quoted} was not read: it is in no document of the {where}"
    drawn.print(Text(answer, "bold"))
    for match in matches[:MATCHES_SHOWN]:
        drawn.print()
        _show_match(drawn, match, losses)
    if len(matches) > MATCHES_SHOWN:
        drawn.print(Text(f"\nand {len(matches) - MATCHES_SHOWN:,} documents more (--json has them all)", "dim"))
    if extent.missing:
        drawn.print(Text(f"note: the text of {len(extent.missing):,} steps cannot be had again", "italic"))


def _show_match(drawn: Console, match: Match, losses: dict[int, Losses]) -> None:
    from rich.text import Text

    for read in match.reads:
        line = Text(f"step {read.step:,}", "bold")
        if not read.whole:
            line.append(" (a part of it)" if match.read else " (a part of it; the rest was cut)", "not bold dim")
        if read.step in losses:
            line.append(f"  {_loss_words(losses[read.step])}", "not bold")
        drawn.print(line)
    if not match.reads:
        drawn.print(Text(f"step {match.first_step:,}", "bold") + Text("  cut: outside what it trained", "not bold"))
    times = f", {match.places:,} times" if match.places > 1 else ""
    place = terminal.visible(f"  {match.shard} row {match.row:,}, character {match.start:,}{times}", line_ends=False)
    drawn.print(Text(place, "dim"))
    context = Text("  … ", "dim")
    shown = match.text if len(match.text) <= _TEXT_SHOWN else f"{match.text[:_TEXT_SHOWN]} … "
    for text, style in ((match.before, "not dim"), (shown, "not dim bold reverse"), (match.after, "not dim")):
        # Indents mean nothing here.
        context.append(terminal.visible(re.sub(r"[ \t]{2,}", " ", text), line_ends=False), style)
    context.append(" …")
    drawn.print(context)


def _loss_words(losses: Losses) -> str:
    row, own = losses.row, ""
    if losses.own_loss is not None:
        plural = "this token" if losses.own_tokens == 1 else f"these {losses.own_tokens} tokens"
        own = f" ({losses.own_loss:.4f} for {plural})"
    accuracy = terminal.number(row["accuracy"], ".1%")
    return f"loss {terminal.number(row['loss'])}{own}, accuracy {accuracy}, {palette.domain_name(row['domain'])}"
