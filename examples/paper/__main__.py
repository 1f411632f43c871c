# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m examples.paper`"""

from examples.paper.run import main


if __name__ == "__main__":
    raise SystemExit(main())
