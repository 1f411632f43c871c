# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m examples.benchmarks.step_cost`"""

from examples.benchmarks.step_cost.run import main


if __name__ == "__main__":
    raise SystemExit(main())
