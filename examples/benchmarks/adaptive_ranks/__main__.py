# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m examples.benchmarks.adaptive_ranks`"""

from examples.benchmarks.adaptive_ranks.run import main


if __name__ == "__main__":
    raise SystemExit(main())
