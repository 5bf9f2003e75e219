"""The sentences of the report: pure functions from numbers to English.

Every sentence is true for every outcome, the unwelcome ones too: a sentence that praises has a
branch for the opposite and one for "this cannot be told".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
NINETY_FIVE = f"95{SPACE}%"
UNKNOWN = "not known"


@dataclass(frozen=True)
class Scale:
    """What of a run is compared with XGen-7B."""

    parameters: int | None
    """None when the run did not tell."""
    tokens: int
    lengths: tuple[int, ...]
    vocabulary: int
    """Rows of the embedding."""
    tokenizer: str
    layers: int
    hidden_size: int


XGEN_7B = Scale(
    parameters=6_895_702_016,
    tokens=1_500_000_000_000,
    lengths=(2048, 4096, 8192),
    vocabulary=51_200,
    tokenizer="xgen",
    layers=32,
    hidden_size=4096,
)
"""The public record: config.json of xgen-7b-8k-base and the stages of its announcement."""


# --- numbers -------------------------------------------------------------------------------------


def count(value: int) -> str:
    """A whole number in full: 6,895,702,016."""
    return f"{value:,}"


def short(value: float) -> str:
    """Three digits and a decimal unit: 1.23M, 800B, 64."""
    if not math.isfinite(value):
        return UNKNOWN
    if abs(value) < 999.5:
        return f"{value:.3g}"
    for unit, size in (("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if abs(value) / size < 999.5 or unit == "T":
            return _digits(value / size) + unit
    raise AssertionError("the loop always returns")


def _digits(value: float) -> str:
    """Three significant digits without an exponent: 1.23, 12.3, 123, 5000."""
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def loss(value: float, decimals: int = 3) -> str:
    """A loss; infinite and undefined ones in words."""
    if math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "infinite" if value > 0 else f"{MINUS}infinite"
    return signless(f"{value:.{decimals}f}")


def signless(text: str) -> str:
    """`text` of a number with a true minus sign, and none before a zero."""
    if text.startswith("-"):
        return text[1:] if not text.strip("-0.") else MINUS + text[1:]
    return text


def signed(value: float, decimals: int = 3) -> str:
    """A difference with its sign: +0.052, −0.052, 0.000."""
    text = loss(value, decimals)
    return f"+{text}" if value > 0 and text.strip("0.") else text


def percent(share: float) -> str:
    """0.53 -> "53 %"; below a tenth with one decimal."""
    if not math.isfinite(share):
        return UNKNOWN
    points = 100 * share
    return f"{points:.0f}{SPACE}%" if points >= 10 or points == 0 else f"{points:.1f}{SPACE}%"


def duration(seconds: float) -> str:
    """The two largest units: "2 min 43 s", "16 d 5 h"."""
    if not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    for unit, size, lower, lower_size in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // lower_size
            return f"{count(whole // size)}{SPACE}{unit}" + (f"{SPACE}{rest}{SPACE}{lower}" if rest else "")
    return f"{whole}{SPACE}s"


def size(bytes_: float) -> str:
    """Binary units: 1.8 GiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if bytes_ >= 2**power:
            return f"{_digits(bytes_ / 2**power)}{SPACE}{unit}"
    return f"{bytes_:.0f}{SPACE}bytes"


def many(number: int, one: str, several: str | None = None) -> str:
    """ "1 document", "40 documents"."""
    return f"{count(number)} {one if number == 1 else several or one + 's'}"


def listed(items: Sequence[str]) -> str:
    """ "2K, 4K and 8K"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# --- what the run shows --------------------------------------------------------------------------


def verdict(low: float, high: float) -> str:
    """What an interval of a paired difference in loss says; a bound of exactly 0 shows nothing."""
    if math.isnan(low) or math.isnan(high):
        return "not known"
    if high < 0:
        return "gain"
    if low > 0:
        return "worse"
    return "not shown"


def _between(low: float, high: float) -> str:
    """An interval of a decided difference, as magnitudes."""
    small, large = sorted((abs(low), abs(high)))
    return f"{NINETY_FIVE} interval {loss(small)} to {loss(large)}"


def last_doubling(difference: float, low: float, high: float, from_context: int, to_context: int) -> str | None:
    """A caution where the last doubling of the context adds nothing; None where it helps."""
    told = verdict(low, high)
    if told not in ("worse", "not shown"):
        return None
    effect = "does harm" if told == "worse" else "is not shown to help"
    return (
        f"The last doubling of the context, from {count(from_context)} to {count(to_context)} tokens, {effect}: "
        f"{signed(difference)} nats per token ({NINETY_FIVE} interval {signed(low)} to {signed(high)})."
    )


def context_gain(difference: float, low: float, high: float, from_context: int, to_context: int, documents: int) -> str:
    """Whether the last checkpoint makes use of its whole context, against a part of it."""
    told = verdict(low, high)
    on = f"paired over {many(documents, 'document')}"
    if told == "gain":
        return (
            f"Longer context helps: with {count(to_context)} tokens of context instead of {count(from_context)}, the "
            "last checkpoint’s "
            f"loss on the very same held-out tokens is {loss(abs(difference))} nats per token lower "
            f"({_between(low, high)}, {on})."
        )
    if told == "worse":
        return (
            f"Longer context does harm here: with {count(to_context)} tokens of context instead of "
            f"{count(from_context)}, the last "
            f"checkpoint’s loss on the very same held-out tokens is {loss(abs(difference))} nats per token higher "
            f"({_between(low, high)}, {on})."
        )
    if told == "not shown":
        return (
            f"No gain from longer context is shown: between {count(from_context)} and {count(to_context)} tokens of "
            "context the last "
            f"checkpoint’s loss on the very same held-out tokens changes by {signed(difference)} nats per token, and "
            f"the {NINETY_FIVE} interval "
            f"from {signed(low)} to {signed(high)} includes 0 ({on})."
        )
    return (
        f"Whether longer context helps is not known: the difference between {count(from_context)} and "
        f"{count(to_context)} tokens is not a number."
    )


def past_length(stage: str, trained: int, context: int, difference: float, low: float, high: float, later: str) -> str:
    """What becomes of a stage's checkpoint at a context longer than it was trained on.

    `difference` is its loss at `context` less its loss at `trained`, with its interval; `later`
    names the checkpoint that was trained on the longer context.
    """
    told = verdict(low, high)
    start = f"The checkpoint of stage ‘{stage}’, trained on sequences of {count(trained)},"
    if told == "worse":
        mend = f"; the stages up to ‘{later}’ are there to mend this" if later != stage else ""
        return (
            f"{start} fails past them: at {count(context)} tokens its loss is {loss(difference)} nats per token "
            "higher than at "
            f"{count(trained)} ({_between(low, high)}){mend}."
        )
    if told == "gain":
        return (
            f"{start} does not fail past them: at {count(context)} tokens its loss is still {loss(abs(difference))} "
            "nats per token "
            f"lower than at {count(trained)} ({_between(low, high)})."
        )
    if told == "not shown":
        return (
            f"{start} does not measurably fail past them: at {count(context)} tokens its loss differs by "
            f"{signed(difference)} nats "
            f"per token from that at {count(trained)}, and the {NINETY_FIVE} interval from {signed(low)} to "
            f"{signed(high)} includes 0."
        )
    return f"{start} could not be judged past them: its loss at {count(context)} tokens is not a number."


def moved(
    where: str, what: str, difference: float, low: float, high: float, before: float, after: float, documents: int
) -> str:
    """What `what` ("training") did to the loss of a continued model at the positions `where`."""
    told = verdict(low, high)
    if told == "not known":
        return f"{where}, what {what} did is not known: there is no interval."
    change = f"from {loss(before)} to {loss(after)} nats per token"
    paired = f"{NINETY_FIVE} interval {signed(low)} to {signed(high)}, paired over {many(documents, 'document')}"
    if told == "not shown":
        return f"{where}, {what} is not shown to change the loss: {change}, {signed(difference)} ({paired})."
    fell = "lowered" if told == "gain" else "raised"
    return f"{where}, {what} {fell} the loss on held-out text {change}, {signed(difference)} ({paired})."


def compression(bits_per_byte: float, xz_bits_per_byte: float, documents: int, context: int) -> str:
    """The model beside a general compressor on the same held-out text."""
    needs = f"the last checkpoint needs {loss(bits_per_byte, 2)} bits per byte at a context of {count(context)}"
    start = f"On {many(documents, 'held-out document')} {needs}"
    if not math.isfinite(bits_per_byte):
        return (
            "The last checkpoint’s bits per byte are not a finite number, so they cannot be set beside the "
            f"{loss(xz_bits_per_byte, 2)} of xz{SPACE}-9e."
        )
    if loss(bits_per_byte, 2) == loss(xz_bits_per_byte, 2):
        return f"{start}, the same to two decimals as xz{SPACE}-9e on the same text."
    ratio = bits_per_byte / xz_bits_per_byte
    how = f"{percent(1 - ratio)} fewer" if ratio < 1 else f"{percent(ratio - 1)} more"
    return f"{start}; xz{SPACE}-9e needs {loss(xz_bits_per_byte, 2)} on the same text. That is {how}."


def generalisation(training: float, held_out: float, steps: int) -> str:
    """The gap between training and held-out loss at the last evaluation in the loop.

    `training` is the mean over the `steps` steps up to it. The two are of different documents, so a gap of
    either sign may come from the texts alone.
    """
    if not (math.isfinite(training) and math.isfinite(held_out)):
        return "The last held-out loss cannot be set beside the training loss: one of them is not a finite number."
    gap = held_out - training
    both = f"held-out loss is {loss(held_out)} nats per token and training loss {loss(training)}"
    start = f"At the last evaluation in the loop {both} (mean of {many(steps, 'step')})"
    if loss(gap, 2) == "0.00":
        return f"{start}. There is no gap to two decimals."
    if gap > 0:
        return (
            f"{start}. Held-out is {loss(gap, 2)} higher, which overfitting, or held-out texts that are harder, would "
            "explain."
        )
    return (
        f"{start}. Held-out is {loss(-gap, 2)} lower: the held-out texts are easier, or the loss fell while the mean "
        "was taken."
    )


def progress(tokens: int, total: int, stage: str | None, stopped: str | None, measured: bool) -> str | None:
    """Whether the run is whole; None when it is, and was measured.

    `stopped` is the reason of the last stop, None when the run wrote no stop.
    """
    done = f"{short(tokens)} of {short(total)} tokens ({percent(tokens / total)})"
    if tokens >= total:
        if measured:
            return None
        return (
            "Training is complete, but the measurements after training are not there, so what they would show is "
            "missing from this page."
        )
    if tokens == 0:
        how = (
            "It was stopped" + (f" ({stopped})" if stopped else "")
            if stopped is not None
            else "It is at its beginning or was ended"
        )
        return f"This run has no finished step yet. {how}."
    where = f", in stage ‘{stage}’" if stage else ""
    if stopped is not None:
        how = f"It was stopped ({stopped}) and can be resumed."
    else:
        how = "It wrote no stop, so it is still going on or was ended from outside; then it can be resumed."
    return f"This run is not finished: {done}{where}. {how} What is measured after training is missing from this page."


def resumes(moments: Sequence[int], repeated: int) -> str | None:
    """How often the run was resumed, from which tokens; None for never."""
    if not moments:
        return None
    points = listed([short(tokens) for tokens in moments])
    again = (
        f" {many(repeated, 'step stands', 'steps stand')} in the log twice; the curves show the last taking."
        if repeated
        else ""
    )
    return f"The log tells of {many(len(moments), 'resume')}, from {points} tokens.{again}"


def spoiled(steps: int) -> str | None:
    """How many steps had a loss that is not a finite number; None for none."""
    if not steps:
        return None
    return f"In {many(steps, 'step')} the loss was not a finite number; the curves have gaps there."


def switch(name: str, before: float, after: float, steps: int) -> str:
    """The mean training loss either side of a stage switch."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return f"At the switch to ‘{name}’ the loss is not a finite number on one side."
    moved = signed(after - before)
    return (
        f"At the switch to ‘{name}’ the training loss goes from {loss(before)} to {loss(after)} ({moved}; means of "
        f"the {many(steps, 'step')} on either side)."
    )


# --- beside XGen-7B ------------------------------------------------------------------------------


def against(value: float, reference: float) -> str:
    """How a number stands to XGen-7B's: "the same", "1/6,420 of it", "2.5 times it", "91 % of it"."""
    if value == reference:
        return "the same"
    ratio = value / reference
    if ratio > 1:
        return f"{_digits(ratio)} times it" if ratio >= 1.5 else f"{percent(ratio - 1)} more"
    if ratio < 0.5:
        part = count(round(1 / ratio)) if ratio < 0.1 else _digits(1 / ratio)
        return f"1/{part if ratio >= 1e-4 else short(1 / ratio)} of it"
    return f"{percent(ratio)} of it" if percent(ratio) != f"100{SPACE}%" else "slightly less"


def scale(run: Scale) -> str:
    """What was scaled against XGen-7B, in one sentence."""
    numbers = [
        ("training tokens", run.tokens, XGEN_7B.tokens, short),
        ("the longest sequence", run.lengths[-1], XGEN_7B.lengths[-1], count),
        ("the vocabulary", run.vocabulary, XGEN_7B.vocabulary, count),
    ]
    if run.parameters is not None and XGEN_7B.parameters is not None:
        numbers.insert(0, ("parameters", run.parameters, XGEN_7B.parameters, short))
    down = [
        f"{name} ({text(value)} of {text(reference)})" for name, value, reference, text in numbers if value < reference
    ]
    up = [
        f"{name} ({text(value)}, there {text(reference)})"
        for name, value, reference, text in numbers
        if value > reference
    ]
    same = [name for name, value, reference, _ in numbers if value == reference]
    if not down and not up:
        return f"Nothing was scaled down: {listed(same)} are those of XGen-7B."
    said = []
    if down:
        said.append(f"Scaled down against XGen-7B: {listed(down)}.")
    if up:
        said.append(f"Larger than in XGen-7B: {listed(up)}.")
    if same:
        said.append(f"The same: {listed(same)}.")
    return " ".join(said)


def lengths(values: Sequence[int]) -> str:
    return " → ".join(count(value) for value in values)
