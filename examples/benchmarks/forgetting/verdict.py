# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The verdict of the forgetting benchmark, in sentences that follow from the intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from examples.benchmarks.forgetting.analysis import LESS, MORE, UNDECIDED


FORMS = (  # which form of ours to prefer
    ("proximal_delta", "proximal_factors"),
    ("proximal_factors_selective", "proximal_factors"),
    ("proximal_delta_selective", "proximal_delta"),
)


def verdict(summary: Mapping) -> list[str]:
    """What follows from the intervals of one setting at the primary level, in plain sentences."""
    measure, level = summary["primary_measure"], str(summary["primary_level"])
    names = {key: arm["words"] for key, arm in summary["arms"].items()}
    at_level = {key: found[level] for key, found in summary["matched"][measure].items()}
    means = {key: found["mean"] for key, found in at_level.items() if found is not None}
    differences = {
        key: {o: of[level] for o, of in row.items()} for key, row in summary["differences"][measure].items()
    }
    ours, baselines = ranked(summary, means)
    if not ours or not baselines:
        return [f"Nothing can be compared at {float(level):.0%} of LoRA's gain: too few arms reach it in every seed."]
    best, baseline = ours[0], baselines[0]
    if winners(differences, baselines):
        outcome = f"{names[best]} forgets significantly less than every baseline"
    elif losers(differences, ours, baselines):
        outcome = f"{names[baseline]} forgets significantly less than every form of ProximalLoRA"
    else:
        outcome = (
            "neither is a form of ProximalLoRA significantly better than every baseline, "
            "nor a baseline than every form"
        )
    lines = [
        f"At {float(level):.0%} of what LoRA gains, {outcome}. The best of ours, {names[best]}, forgets "
        f"{means[best]:.4f}, the best baseline, {names[baseline]}, {means[baseline]:.4f}; difference "
        f"{interval(differences[best][baseline])}."
    ]
    for key in ours:
        by_sign: dict[str, list[str]] = {LESS: [], MORE: [], UNDECIDED: []}
        for other in baselines:
            found = differences[key][other]
            by_sign[found["sign"] if found else UNDECIDED].append(names[other])
        phrases = {LESS: "forgets less than", MORE: "forgets more than", UNDECIDED: "undecided against"}
        parts = [f"{phrase} {_list(by_sign[sign])}" for sign, phrase in phrases.items() if by_sign[sign]]
        lines.append(f"{names[key]}: {'; '.join(parts)}.")
    for first, second in FORMS:
        found = differences.get(first, {}).get(second)
        if found:
            lines.append(f"{names[first]}, less {names[second]}: {interval(found)} ({found['sign']}).")
    unreached = [names[key] for key in at_level if key not in means]
    if unreached:
        lines.append(f"Not compared, since it does not reach this level in enough seeds: {_list(unreached)}.")
    return lines


def ranked(summary: Mapping, means: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Forms of ProximalLoRA and baselines that reach the level, the one that forgets least first."""
    order = sorted(means, key=means.__getitem__)
    ours = [key for key in order if summary["arms"][key]["ours"]]
    return ours, [key for key in order if key not in ours]


def winners(differences: Mapping, baselines: Sequence[str]) -> set[str]:
    """Forms of ours that significantly forget less than each of the baselines."""
    return {key for key, row in differences.items() if all((row[r] or {}).get("sign") == LESS for r in baselines)}


def losers(differences: Mapping, ours: Sequence[str], baselines: Sequence[str]) -> set[str]:
    """Baselines that significantly forget less than each form of ours."""
    return {r for r in baselines if all((differences[key][r] or {}).get("sign") == MORE for key in ours)}


def overall(settings: Mapping[str, Mapping]) -> str:
    """One sentence over all settings: it counts what is decided in every one of them."""
    better, worse = [], []
    for summary in settings.values():
        level, measure = str(summary["primary_level"]), summary["primary_measure"]
        differences = {
            k: {o: of[level] for o, of in row.items()} for k, row in summary["differences"][measure].items()
        }
        found = {key: of[level] for key, of in summary["matched"][measure].items()}
        ours, baselines = ranked(summary, {key: value["mean"] for key, value in found.items() if value})
        better.append(winners(differences, baselines) if ours and baselines else set())
        worse.append(losers(differences, ours, baselines) if ours and baselines else set())
    names = {key: arm["words"] for summary in settings.values() for key, arm in summary["arms"].items()}
    where = "in both settings" if len(settings) == 2 else f"in {len(settings)} setting(s)"
    if set.intersection(*better):
        best = _list(names[key] for key in sorted(set.intersection(*better)))
        return f"{best}: significantly less is forgotten than with every baseline, {where}."
    if set.intersection(*worse):
        best = _list(names[key] for key in sorted(set.intersection(*worse)))
        return (
            f"{best}: significantly less is forgotten than with every form of ProximalLoRA, {where}. Against "
            "forgetting, ProximalLoRA is not the best choice here."
        )
    return (
        f"No form of ProximalLoRA is significantly better than every baseline {where}, and no baseline significantly "
        "better than every form of it."
    )


def interval(found: Mapping | None) -> str:
    if found is None:
        return "not reached"
    if found["low"] is None:
        return f"{found['mean']:+.4f} (one seed)"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def _list(words: Iterable[str]) -> str:
    words = list(words)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
