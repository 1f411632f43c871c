# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The command `peft-linear`: arguments, and what each subcommand calls. Imports are lazy so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version


TOOLS = ("axolotl", "llamafactory", "trl")
SPACES = ("lora", "weight", "rows", "columns", "bias")
DATA_HELP = """Columns of language data (causal-lm), prepared as TRL's SFTTrainer does (extra [trl]): messages, a list
of {role, content}; prompt and completion, texts or such lists; text; instruction, input and output (Alpaca); or
conversations, a list of {from, value} (ShareGPT). Columns of a classification: a text or a pair (text, sentence,
premise and hypothesis, ...) and a label (label, labels, class, ...)."""
CRITERIA_HELP = "default-by-evidence, or the name of a criterion; an unknown name lists them"


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after an error that is the user's to fix."""
    arguments = build_parser().parse_args(argv)
    from ..errors import PeftLinearError

    try:
        arguments.run(arguments)
    except PeftLinearError as error:
        print(f"peft-linear {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"peft-linear {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="peft-linear", description="Choose the modules to fine-tune by their neural tangent kernels."
    )
    parser.add_argument("--version", action="version", version=f"peft-linear {version('peft-linear')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_recommend(commands)
    _add_export(commands)
    return parser


def _add_recommend(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "recommend",
        help="recommend target modules before training",
        description="Computes the kernels of every candidate module on some examples, chooses within the budget, and "
        "writes the recommendation (JSON, Markdown, HTML, figure), the kernels, and an adapter config.",
        formatter_class=_Defaults,
    )
    parser.set_defaults(run=_recommend)
    _add_data_arguments(parser.add_argument_group("model and data", DATA_HELP))
    _add_choice_arguments(parser.add_argument_group("choice"))
    _add_run_arguments(parser.add_argument_group("run"))


def _add_data_arguments(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--model", required=True, help='folder, Hub name, or "minilm" (extra [demo])')
    what.add_argument("--dataset", required=True, help="JSONL/CSV file, folder with train.jsonl …, or a Hub name")
    what.add_argument(
        "--task",
        choices=("auto", "classification", "causal-lm"),
        default="auto",
        help="auto: causal-lm for the five formats of language data without labels, classification for a text with a "
        "label",
    )
    what.add_argument("--split", default="train", help="split to take examples from")
    what.add_argument(
        "--text-column",
        "--text-columns",
        nargs="+",
        metavar="NAME",
        help="column(s) with the text (two: a pair for a classifier, or prompt and completion); default: found by the "
        "usual names",
    )
    what.add_argument(
        "--label-column", metavar="NAME", help="column with the label; default: found by the usual names"
    )
    what.add_argument(
        "--assistant-only-loss", action="store_true", help="as in trl.SFTConfig: only the assistant's tokens count"
    )
    what.add_argument("--examples", type=int, default=64, help="examples to compute kernels on")
    what.add_argument("--batch-size", type=int, default=16, help="examples in a forward pass")
    what.add_argument(
        "--max-length",
        type=int,
        help="tokens of an example at most; default: 128 for classification, TRL's default for causal-lm",
    )
    what.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the model's weights; default: that of from_pretrained",
    )


def _add_choice_arguments(choice: argparse._ArgumentGroup) -> None:
    choice.add_argument(
        "--budget",
        required=True,
        nargs="+",
        help="number of modules (8), fraction of the candidates' adapter parameters (0.25), "
        "adapter parameters (1.5M, 200k), layers:4, or a share of an all-linear LoRA step (time:0.6, memory:0.6); "
        "several hold together",
    )
    choice.add_argument("--criterion", default="default-by-evidence", help=CRITERIA_HELP)
    choice.add_argument("--strategy", default="greedy", help="greedy, or top (the best modules on their own)")
    choice.add_argument(
        "--ridge",
        type=float,
        help="λ in the unit of the kernel's eigenvalues; default: the one with the least leave-one-out error",
    )
    choice.add_argument(
        "--optimizer",
        choices=("adamw", "sgd"),
        help="of the planned training; default: adamw for the default criterion",
    )
    choice.add_argument(
        "--head-steps",
        type=int,
        help="training steps of the task head before kernels are computed through it; default: 20 for gradient "
        "energy, else 0",
    )
    choice.add_argument(
        "--train-batch-size", type=int, default=8, help="batch size of the planned training; used with adamw"
    )
    choice.add_argument("--targets", nargs="+", default=["all-linear"], help="candidates: names or suffixes")
    choice.add_argument(
        "--exclude", nargs="*", help="name components of candidates that are not to be chosen; default: pooler"
    )
    choice.add_argument("--rank", type=int, default=8, help="rank of the adapter")
    choice.add_argument("--alpha", type=float, default=16.0, help="lora_alpha of the adapter")
    choice.add_argument(
        "--space", choices=SPACES, default="lora", help="parameters of each module that the kernel covers"
    )
    choice.add_argument(
        "--draws",
        type=int,
        help="draws of LoRA's random A to average over; default: 32 for causal-lm, else 1, and 8 for the loss kernels "
        "of the head",
    )
    choice.add_argument(
        "--proximal-lambda",
        type=lambda text: text if text == "auto" else float(text),
        default="auto",
        help="proximal_lambda of the adapter config: 'auto' or a number",
    )


def _add_run_arguments(run: argparse._ArgumentGroup) -> None:
    run.add_argument(
        "--seed", type=int, default=0, help="seed of the sampled examples, a new head, LoRA's A and the folds"
    )
    run.add_argument(
        "--max-memory", metavar="SIZE", help="such as 4GB: what kernels may keep in memory, more goes to files"
    )
    run.add_argument("--device", help="cpu, cuda, …; default: cuda where there is one")
    run.add_argument("--output", default="recommendation", metavar="FOLDER", help="where the files go")
    run.add_argument("--yaml", choices=TOOLS, help="also write the adapter part of this tool's file, as <tool>.yaml")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="only print what a LoRA step and this command would take; reads the model's configuration, no weights",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bars and no table")


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export-lora",
        help="turn a saved ProximalLoRA adapter into plain LoRA",
        description="Writes a copy of the adapter that stock peft loads without this package.",
    )
    parser.set_defaults(run=_export)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter")
    parser.add_argument("output", metavar="OUT", help="folder to write")


def _recommend(arguments: argparse.Namespace) -> None:
    from .recommend import run_recommend

    run_recommend(arguments)


def _export(arguments: argparse.Namespace) -> None:
    from ..tuners.proximal_lora.export import export_lora

    export_lora(arguments.adapter, arguments.output)
    print(f"plain LoRA adapter written to {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
