# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""The demo: modules chosen before training, trained, saved, loaded, exported."""
