"""What the oldest versions lack, so that tests which need it are skipped there."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import tokenizers
import torch

TRAINS = torch.__version__ >= "2.6"
READS_GGUF = importlib.util.find_spec("transformers.integrations.gguf") is not None
OF_TRAINING = [
    "corpus/test_engine_ray.py", "corpus/test_reading.py", "fuzz", "test_architecture.py", "test_bench.py",
    "test_demo.py", "test_distillkit.py", "test_documentation.py", "test_examples.py", "test_import.py",
    "test_report.py", "train",
]  # fmt: skip
"""Where tests are left out whole without the versions that training needs."""

needs_training = pytest.mark.skipif(not TRAINS, reason="xtoken.train needs newer versions")
needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on the CPU"
)
needs_what_a_graph_says = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="the compiler of torch 2.6 does not pass errors on; others were not tried"
)
needs_what_a_transform_says = pytest.mark.skipif(not TRAINS, reason="torch 2.4 refuses them in its own words")
needs_offsets = pytest.mark.skipif(
    tokenizers.__version__ == "0.20.0", reason="tokenizers 0.20.0 says of most tokens that they are empty"
)
needs_bands = pytest.mark.skipif(np.__version__ == "1.24.0", reason="matplotlib fills nothing with this numpy")
needs_mistral = pytest.mark.skipif(
    not READS_GGUF, reason="transformers 4 cuts spaces with Mistral's tokenizer in another way"
)
