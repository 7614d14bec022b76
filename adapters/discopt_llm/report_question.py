"""What a run was asked, and whether it met that, as parts of its report."""

from __future__ import annotations

from discopt_llm import report_page as html
from discopt_llm.budget import MEASURES, Budget
from discopt_llm.markup import Markup, join, tag
from discopt_llm.report_record import RunRecord
from discopt_llm.report_words import fitness_words, size_words

__all__ = ["asked_words", "budget", "question"]

_MET = {
    "bits": ("bits on average", "{:.3f}"),
    "bpw": ("stored bits per weight, with scales, zero points and masks", "{:.3f}"),
    "bytes": ("file, bytes, with what is not compressed", "{:,}"),
    "size": ("file, × the dense one in 16 bits", "{:.4f}"),
    "sparsity": ("zeros", "{:.2%}"),
    "dropped": ("sub-blocks dropped", "{:.2%}"),
    "attention_dropped": ("attention sub-blocks dropped", "{:d}"),
    "mlp_dropped": ("MLP sub-blocks dropped", "{:d}"),
    "blocks": ("blocks of the model", "{:d}"),
}


def asked_words(record: RunRecord) -> str:
    """The budget in words: "an average of 3 bits"."""
    words = []
    for measure, value in record.results["asked"].items():
        if record.profile.kind == "drop" and measure == "sparsity":
            what = "attention and MLP sub-blocks" if record.profile.unit == "sublayer" else "blocks"
            words.append(f"{value:.1%} of the {what} dropped")
        elif measure in MEASURES:
            words.append(Budget.parse(measure, str(value)).words)
        else:
            words.append(f"{measure} {value}")
    return ", ".join(words)


def question(record: RunRecord) -> Markup:
    """What the search was to do, and with what."""
    options, results = record.request.get("options", {}), record.results
    settings = results.get("settings", {})
    fitness = options.get("fitness", "kl")
    unsaid = f"as the preset {options.get('preset')} has it"
    text = [f"{options.get('calibration')}"]
    text += [f"{settings['calibration_tokens']:,} tokens to search on"] if "calibration_tokens" in settings else []
    text += [f"{settings['reserved_tokens']:,} for the final choice"] if settings.get("reserved_tokens") else []
    heldout = results["heldout"]
    entries: list[tuple[str, str]] = [
        ("Model", record.model),
        ("Command", f"discopt {record.request['command']}"),
        ("Budget", asked_words(record)),
        ("Units", f"{record.units.n:,}, each a {record.profile.unit}; at most {len(record.units.labels[0])} levels"),
        ("Algorithm", settings.get("algorithm") or options.get("algorithm") or unsaid),
        ("Preset", str(options.get("preset"))),
        ("Stages", ", ".join(settings.get("stages", ())) or ", ".join(options.get("stages", ())) or unsaid),
        ("Start", settings.get("start") or options.get("start") or unsaid),
        ("Fitness", f"{fitness}: {fitness_words(fitness)}"),
        ("Text", "; ".join(text)),
        ("Held-out text", f"{heldout['tokens']:,} tokens of {heldout['source']}"),
        ("Seed", str(results["seed"])),
        *(("Bank", f"{bank.path} ({bank.fingerprint[:12]})") for bank in record.profile.banks),
    ]
    return html.facts(entries)


def budget(record: RunRecord) -> Markup:
    """What was asked for, and what the profile comes to."""
    met, asked = dict(record.results["met"]), record.results["asked"]
    if record.profile.kind == "drop":
        met = {"dropped": (met["attention_dropped"] + met["mlp_dropped"]) / max(2 * met["blocks"], 1), **met}
        wanted = {"dropped": f"{asked['sparsity']:.2%}"}
    else:
        # A size in bytes is met by bytes, one that is a multiple of the dense file by that multiple.
        wanted = {
            "bytes" if measure == "size" and not Budget.parse("size", str(value)).relative else measure: str(value)
            for measure, value in asked.items()
        }
    rows = []
    for measure, value in met.items():
        name, form = _MET.get(measure, (measure, "{}"))
        shown: html.Cell = form.format(value)
        if measure == "bytes":
            shown = join(size_words(value), tag("br"), tag("small", shown))
        rows.append((name, wanted.get(measure, ""), shown))
    return html.table("What was asked, and what the profile comes to in every measure", ("", "asked", "met"), rows)
