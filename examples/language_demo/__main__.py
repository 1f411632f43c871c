# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0

import sys

from .run import main


if __name__ == "__main__":
    sys.exit(main())
