# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Tables and the verdict of the demo, from the measured runs and what was predicted before them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from examples.demo.arms import Arm, Protocol, Run, mean_and_deviation
from peft_linear.report.markdown import markdown_table


@dataclass(frozen=True)
class Summary:
    """What the demo found: Markdown tables (readable as they stand in a terminal), one verdict, and the numbers."""

    table: str
    predictions: str
    verdict: str
    protocol: str
    runs: Mapping[str, tuple[Run, ...]]  # by arm
    predicted: Mapping[str, Mapping[str, float]]


def summarize(
    arms: Sequence[Arm],
    runs: Iterable[Run],
    predicted: Mapping[str, Mapping[str, float]],
    protocol: Protocol,
    seeds: Sequence[int],
) -> Summary:
    """The first arm is the recommendation; the others are its baselines."""
    runs = list(runs)
    by_arm = {arm.key: tuple(run for run in runs if run.arm == arm.key) for arm in arms}
    return Summary(
        table=results_table(arms, by_arm),
        predictions=predictions_table(arms, by_arm, predicted),
        verdict="\n".join(verdict(arms[0], baseline, by_arm) for baseline in arms[1:]),
        protocol=describe(protocol, seeds),
        runs=by_arm,
        predicted=predicted,
    )


def results_table(arms: Sequence[Arm], by_arm: Mapping[str, Sequence[Run]]) -> str:
    """Mean ± standard deviation over the seeds; parameters and modules are exact."""
    header = ("arm", "test accuracy", "test loss", "‖ΔW‖", "adapter parameters", "modules", "rank", "lr", "time (s)")
    rows = [
        (
            arm.label,
            spread((run.test_accuracy for run in by_arm[arm.key]), "{:.1%}"),
            spread((run.test_loss for run in by_arm[arm.key]), "{:.3f}"),
            spread((run.weight_distance for run in by_arm[arm.key]), "{:.2f}"),
            f"{by_arm[arm.key][0].adapter_parameters:,}",
            str(len(arm.modules)),
            str(arm.rank),
            f"{by_arm[arm.key][0].learning_rate:g}",
            spread((run.train_seconds for run in by_arm[arm.key]), "{:.1f}"),
        )
        for arm in arms
    ]
    return "\n\n".join(
        [aligned_table(header, rows), *(pull(arm, by_arm[arm.key]) for arm in arms if arm.proximal_lambda)]
    )


def pull(arm: Arm, runs: Sequence[Run]) -> str:
    """How the proximal term was set and how often it acted."""
    rates = [run.firing_rate or 0.0 for run in runs]
    often = "every step" if min(rates) == 1 else f"{spread(rates, '{:.0%}')} of the steps"
    return f"The proximal term of “{arm.label}” (λ = {arm.proximal_lambda:g}) acted at {often}."


def predictions_table(
    arms: Sequence[Arm], by_arm: Mapping[str, Sequence[Run]], predicted: Mapping[str, Mapping[str, float]]
) -> str:
    """Prediction beside measurement: the order of the arms is what the theory can know, not the numbers."""
    header = ("arm", "loss: predicted", "measured", "accuracy: predicted", "measured", "‖θ−θ0‖: predicted", "measured")
    rows = []
    for arm in arms:
        runs, before = by_arm[arm.key], predicted[arm.key]
        rows.append(
            (
                arm.label,
                f"{before['loss']:.3f}",
                spread((run.test_loss for run in runs), "{:.3f}"),
                f"{before['accuracy']:.1%}",
                spread((run.test_accuracy for run in runs), "{:.1%}"),
                f"{before['adapter_distance']:.2f}",
                spread((run.parameter_distance for run in runs), "{:.2f}"),
            )
        )
    order = sorted(arms, key=lambda arm: predicted[arm.key]["loss"])
    measured = sorted(arms, key=lambda arm: mean_and_deviation(run.test_loss for run in by_arm[arm.key])[0])
    names = [" < ".join(arm.key for arm in arms) for arms in (order, measured)]
    return (
        f"{aligned_table(header, rows)}\n\n"
        f"Order of the losses: predicted {names[0]}; measured {names[1]}.\n"
        "Predicted is held-out loss and accuracy of gradient descent simulated on the kernels of a few calibration "
        "examples, and the distance of the ridge regression; measured is AdamW on the whole training split. The order "
        "of the arms can be compared, the numbers hardly."
    )


def verdict(ours: Arm, baseline: Arm, by_arm: Mapping[str, Sequence[Run]]) -> str:
    """Whether the recommendation beats a baseline, in words: paired over seeds, beyond two standard errors or not."""
    parts, outcomes = [], []
    for words, value, sign in (
        ("test loss {:+.3f} ± {:.3f}", lambda run: run.test_loss, -1),
        ("accuracy {:+.1f} ± {:.1f} points", lambda run: 100 * run.test_accuracy, 1),
    ):
        differences = [value(a) - value(b) for a, b in zip(by_arm[ours.key], by_arm[baseline.key], strict=True)]
        mean, deviation = mean_and_deviation(differences)
        error = deviation / math.sqrt(len(differences))
        parts.append(words.format(mean, error))
        clear = len(differences) > 1 and abs(mean) > 2 * error
        outcomes.append(int(clear) * (1 if mean * sign > 0 else -1))
    share = by_arm[ours.key][0].adapter_parameters / by_arm[baseline.key][0].adapter_parameters
    facts = f"{', '.join(parts)} (mean ± standard error of the difference, {share:.0%} of its parameters)"
    if min(outcomes) >= 0 and max(outcomes) > 0:
        return f"The recommendation beats “{baseline.label}”: {facts}."
    if max(outcomes) <= 0 and min(outcomes) < 0:
        return f"The recommendation LOSES to “{baseline.label}”: {facts}."
    return f"The recommendation does not win against “{baseline.label}”, no clear difference: {facts}."


def describe(protocol: Protocol, seeds: Sequence[int]) -> str:
    rates = ", ".join(f"{rate:g}" for rate in protocol.learning_rates)
    how = (
        f"the better of the learning rates {rates} on the validation split"
        if "," in rates
        else f"learning rate {rates}"
    )
    return (
        f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}. Every arm: AdamW without weight "
        f"decay, linear schedule, {protocol.steps} steps of {protocol.batch_size} examples, {how}, the same head and "
        "batch order for a seed. The modules were chosen once, on the model of the first seed. ‖ΔW‖ is the Frobenius "
        "norm of the change of all adapted weights; adapter parameters do not count the task head, which is always "
        "trained."
    )


def spread(values: Iterable[float], form: str) -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{form.format(mean)} ± {form.format(deviation)}"


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are padded to one width."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    padded = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    ]
    return markdown_table(padded[0], padded[1:], right=range(1, len(header)))
